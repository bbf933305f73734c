"""Trackers of a run: those that it asks for, and only these are imported."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from dist_ft.config.plan import make_plan
from dist_ft.errors import MachineError
from dist_ft.launch.composition.compose import compose
from dist_ft.state import Progress
from dist_ft.track import needs
from dist_ft.track.trackers import build_tracker, read_tracking

CODE = """
import sys
from pathlib import Path
from types import SimpleNamespace as Some
from dist_ft.config.track import TrackConfig
from dist_ft.track.trackers import build_tracker

worker = Some(place=Some(is_main=True), terminal=sys.stderr, say=print, above=None)
plan = Some(config=Some(track=TrackConfig(wandb="off", report=False)), run_dir=Path(sys.argv[1]))
(plan.run_dir / "logs").mkdir()
tracker, identity = build_tracker(plan, Some(step=0, tracker_id="kept"), 3, worker)
tracker.log({"train/loss": 1.0}, step=1)
tracker.close()
print(identity, "wandb" in sys.modules, (plan.run_dir / "metrics.jsonl").exists())
"""


def test_a_run_without_wandb_does_not_import_it(tmp_path: Path) -> None:
    run = subprocess.run([sys.executable, "-c", CODE, str(tmp_path)], capture_output=True, text=True, check=False)
    assert run.stdout.split() == ["kept", "False", "True"], run.stderr


def at_step(step: int) -> Progress:
    return Progress(step, 1, "ddp", None, None, None, 0)


def test_a_run_is_tracked_by_all_that_it_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    monkeypatch.chdir(tmp_path)
    words = ["track.to=[tensorboard,mlflow]", "track.report=false", "track.project=mine", f"output_dir={tmp_path}/run"]
    config = compose(words).config
    (tmp_path / "run/logs").mkdir(parents=True)
    (tmp_path / "run/record.json").write_text(json.dumps({"versions": {"torch": "9.9"}}))
    plan = make_plan(config, nodes=1, workers_per_node=1, origins={})
    told: list[str] = []
    worker = SimpleNamespace(place=SimpleNamespace(is_main=True), terminal=sys.stderr, say=told.append, above=None)
    tracker, _ = build_tracker(plan, at_step(0), 3, worker)
    tracker.log({"train/loss": 1.0}, step=1)
    tracker.close()
    run_id = read_tracking(tmp_path / "run")["mlflow"]["run_id"]
    resumed, _ = build_tracker(plan, at_step(1), 3, worker)
    resumed.close(RuntimeError("nan"))
    assert read_tracking(tmp_path / "run")["mlflow"]["run_id"] == run_id
    assert [line.split(":")[0] for line in told] == ["TensorBoard", "MLflow"] * 2
    from mlflow import MlflowClient

    found = MlflowClient().get_run(run_id)
    assert found.info.status == "FAILED"
    assert found.data.params["versions.torch"] == "9.9"
    assert found.data.params["plan.world_size"] == "1"
    assert list((tmp_path / "run/tensorboard").iterdir())


def test_a_package_that_is_missing_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(needs, "find_spec", lambda name: None)
    config = compose(["track.to=[trackio]", f"output_dir={tmp_path}"]).config
    plan = make_plan(config, nodes=1, workers_per_node=1, origins={})
    worker = SimpleNamespace(place=SimpleNamespace(is_main=True), terminal=sys.stderr, say=print, above=None)
    with pytest.raises(MachineError, match=r"pip install 'dist-ft\[trackio\]'"):
        build_tracker(plan, at_step(0), 3, worker)
