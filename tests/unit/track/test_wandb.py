"""W&B: same metric names, one run across resumes, no secrets, no interruption of training."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.track import TrackConfig
from dist_ft.errors import MachineError
from dist_ft.track import wandb as tracker
from dist_ft.track.compose import NullTracker

OFFLINE = TrackConfig(wandb="offline", project="proj", tags=["one"])


def records(file: Path) -> Iterator[Any]:
    """Records of a .wandb file, which has the LevelDB log format: 32 KiB blocks of fragments with checksums."""
    from wandb.proto import wandb_internal_pb2

    data, at, whole = file.read_bytes(), 7, b""
    while at < len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, at)
        whole += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # a full record, or the last fragment of one
            record = wandb_internal_pb2.Record()
            record.ParseFromString(whole)
            yield record
            whole = b""


def history(file: Path) -> list[dict[str, Any]]:
    rows = [r.history for r in records(file) if r.WhichOneof("record_type") == "history"]
    return [{i.key or "/".join(i.nested_key): json.loads(i.value_json) for i in row.item} for row in rows]


def run_files(folder: Path) -> list[Path]:
    return sorted((folder / "wandb").glob("*run-*/run-*.wandb"), key=lambda f: f.stat().st_mtime_ns)


@pytest.fixture
def no_key(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    for name in ("WANDB_API_KEY", "WANDB_MODE", "WANDB_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    return tmp_path / "netrc"


def test_offline_runs_hold_metrics_settings_and_one_id(tmp_path: Path) -> None:
    settings = {"optim": {"learning_rate": 0.5}}
    first, identity = tracker.open_wandb(
        OFFLINE, run_dir=tmp_path, run_name="n", settings=settings, run_id=None, warn=print
    )
    first.log({"eval/loss": 3.0}, step=0)
    first.log({"train/loss": 2.0}, step=1)
    first.log({"eval/loss": 1.5}, step=1)
    first.close()
    second, again = tracker.open_wandb(
        OFFLINE, run_dir=tmp_path, run_name="n", settings=settings, run_id=identity, warn=print
    )
    second.log({"train/loss": 1.0}, step=2)
    second.close()
    assert identity and again == identity
    one, two = run_files(tmp_path)
    assert [one.name, two.name] == [f"run-{identity}.wandb"] * 2
    rows = [{k: v for k, v in row.items() if "/" in k or k == "_step"} for row in history(one)]
    assert rows == [{"eval/loss": 3.0, "_step": 0}, {"train/loss": 2.0, "eval/loss": 1.5, "_step": 1}]
    (begun,) = [r.run for r in records(one) if r.WhichOneof("record_type") == "run"]
    assert (begun.project, begun.display_name, list(begun.tags)) == ("proj", "n", ["one"])
    config = {item.key: json.loads(item.value_json) for item in begun.config.update}
    assert config["optim"] == {"learning_rate": 0.5}


def test_no_secret_reaches_the_disk(tmp_path: Path) -> None:
    """Run in a subprocess, with secrets in environment variables, arguments, standard output and settings."""
    code = f"""
import os, sys
os.environ["WANDB_API_KEY"] = "planted-" + "a" * 32
os.environ["HF_TOKEN"] = "planted-hub"
print("planted-stdout")
from pathlib import Path
from dist_ft.config.track import TrackConfig
from dist_ft.track.wandb import open_wandb
settings = {{"seen": "visible-word", "api_key": "planted-value", "setup": ["export MY_TOKEN=planted-line"],
             "data": "https://me:planted-word@host/f?sig=1&token=planted-query", "note": "is planted-hub here"}}
t, _ = open_wandb(
    TrackConfig(wandb="offline"), run_dir=Path({str(tmp_path)!r}), run_name="n", settings=settings, run_id=None
)
print("planted-stdout")
print("planted-stderr", file=sys.stderr)
t.log({{"train/loss": 1.0}}, step=1)
t.close()
os._exit(0)  # workers end like this
"""
    run = subprocess.run([sys.executable, "-c", code, "--token=planted-argv"], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    (file,) = run_files(tmp_path)
    decoded = "".join(str(record) for record in records(file))
    everything = decoded + "".join(p.read_text("latin1") for p in tmp_path.rglob("*") if p.is_file())
    assert "visible-word" in decoded  # the reader of this test works
    assert history(file)[0]["train/loss"] == 1.0
    assert "planted" not in everything


def test_online_without_a_key_is_refused(no_key: Path, tmp_path: Path) -> None:
    with pytest.raises(MachineError, match=r"track\.wandb=online: no W&B API key"):
        tracker.open_wandb(TrackConfig(wandb="online"), run_dir=tmp_path, run_name="n", settings={}, run_id=None)


def test_off_touches_nothing(tmp_path: Path) -> None:
    found, identity = tracker.open_wandb(
        TrackConfig(wandb="off"), run_dir=tmp_path, run_name="n", settings={}, run_id="abc"
    )
    assert isinstance(found, NullTracker) and identity == "abc" and list(tmp_path.iterdir()) == []


def test_no_network_goes_on_offline(no_key: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The W&B server is at a port on which no process listens."""
    monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setattr(tracker, "INIT_TIMEOUT_S", 1)
    warnings: list[str] = []
    found, identity = tracker.open_wandb(
        TrackConfig(wandb="auto"), run_dir=tmp_path, run_name="n", settings={}, run_id=None, warn=warnings.append
    )
    found.log({"train/loss": 4.0}, step=1)
    found.close()
    assert len(warnings) == 2 and "starting offline" in warnings[0] and "wandb sync" in warnings[1]
    (offline,) = tmp_path.glob(f"wandb/offline-run-*/run-{identity}.wandb")
    assert history(offline)[0]["train/loss"] == 4.0


def test_a_failing_run_is_given_up_once() -> None:
    class Broken:
        dir = "the/folder"
        calls = 0

        def log(self, metrics: object, step: int) -> None:
            self.calls += 1
            raise RuntimeError("the service is gone\nand more")

        def finish(self, exit_code: int) -> None:
            self.calls += 1

    warnings: list[str] = []
    run = Broken()
    found = tracker.WandbTracker(run, warnings.append)
    found.log({"a": 1.0}, step=1)
    found.log({"a": 1.0}, step=2)
    found.close()
    assert run.calls == 1
    assert warnings == [
        "W&B failed (the service is gone) and is disabled; upload the data in the/folder with `wandb sync`"
    ]


def test_the_page_is_known_online_only() -> None:
    class Run:
        url = "https://wandb.example/one"

    assert tracker.WandbTracker(Run(), print).url == "https://wandb.example/one"
    assert tracker.WandbTracker(Run(), print, Path("offline-run")).url is None


@pytest.mark.parametrize(("best", "lower"), [("eval/loss", True), ("eval/perplexity/books", True), ("eval/f1", False)])
def test_a_run_that_failed_is_told_and_the_best_value_is_defined(tmp_path: Path, best: str, lower: bool) -> None:
    told: list[str] = []
    found, _ = tracker.open_wandb(
        OFFLINE, run_dir=tmp_path, run_name="n", settings={}, run_id=None, best=best, warn=told.append
    )
    found.log({"eval/loss": 3.0}, step=1)
    found.close(RuntimeError("step 2: loss is nan, token=planted-word"))
    (file,) = run_files(tmp_path)
    kept = {record.WhichOneof("record_type"): record for record in records(file)}
    assert kept["exit"].exit.exit_code == 1
    assert kept["alert"].alert.title == "n failed"
    assert kept["alert"].alert.level == "ERROR"
    assert kept["alert"].alert.text == "step 2: loss is nan, token=[hidden]"
    (metric,) = [r.metric for r in records(file) if r.WhichOneof("record_type") == "metric" and r.metric.name == best]
    assert (metric.summary.min, metric.summary.max) == (lower, not lower)
    assert told == [f"W&B was offline; upload the run with `wandb sync {file.parent}`"]
    assert file.parent.is_dir()
