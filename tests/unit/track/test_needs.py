"""What trackers need on a machine: the key of W&B, and packages."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.track import TrackConfig
from dist_ft.errors import MachineError
from dist_ft.launch.machine.environ import variable
from dist_ft.track.needs import describe_mode, find_mode, tracker_problems


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_auto_is_online_only_with_a_key(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_mode("auto", variable) == "offline"
    no_key.write_text("machine other.example login user password p\n")
    assert find_mode("auto", variable) == "offline"
    no_key.write_text("machine api.wandb.ai login user password p\n")
    assert find_mode("auto", variable) == "online"
    monkeypatch.setenv("WANDB_BASE_URL", "https://wandb.example:8080")
    assert find_mode("auto", variable) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert find_mode("auto", variable) == "online"
    monkeypatch.setenv("WANDB_MODE", "online")
    assert find_mode("auto", variable) == "online"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert find_mode("auto", variable) == "off" and find_mode("offline", variable) == "offline"


def test_online_by_the_environment_without_a_key_is_refused(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WANDB_MODE", "online")
    with pytest.raises(MachineError, match="no W&B API key"):
        find_mode("auto", variable)


def test_a_plan_says_what_auto_becomes_and_why(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert describe_mode("auto", variable).startswith("offline (no W&B API key was found")
    assert "the run would not start" in describe_mode("online", variable)
    assert describe_mode("offline", variable) == "offline"
    monkeypatch.setenv("WANDB_API_KEY", "k")
    assert describe_mode("auto", variable) == "online (an API key was found)"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert describe_mode("auto", variable) == "offline (WANDB_MODE=offline)"


def test_what_is_missing_is_told_before_a_start(no_key: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_ft.track.needs.find_spec", lambda name: None)
    track = TrackConfig(to=["wandb", "mlflow", "tensorboard"], wandb="online")
    told = [str(problem) for problem in tracker_problems(track, variable)]
    assert len(told) == 3
    assert "pip install 'dist-ft[mlflow]'" in told[0]
    assert "pip install 'dist-ft[tensorboard]'" in told[1]
    assert "no W&B API key" in told[2]
    assert not list(tracker_problems(TrackConfig(), variable))
