"""MLflow: what its own client finds in a database."""

from __future__ import annotations

from pathlib import Path

import pytest
from mlflow import MlflowClient

from dist_ft.track.mlflow import MLflow, flatten


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    monkeypatch.chdir(tmp_path)
    return uri


def test_a_resumed_run_goes_on_and_a_failed_one_is_told(server: str) -> None:
    first = MLflow("experiment", "name", {"optim": {"learning_rate": 0.5, "betas": [0.9, 0.95]}, "note": "x" * 900})
    first.log({"train/loss": 3.0}, step=1)
    first.close()
    client = MlflowClient(server)
    assert client.get_run(first.run_id).info.status == "FINISHED"
    second = MLflow("experiment", "name", {}, run_id=first.run_id)
    second.log({"train/loss": 2.0, "eval/loss": 1.0}, step=2)
    second.close(RuntimeError("nan"))
    (run,) = client.search_runs([client.get_experiment_by_name("experiment").experiment_id])
    assert run.info.run_name == "name"
    assert run.info.status == "FAILED"
    assert [(m.step, m.value) for m in client.get_metric_history(run.info.run_id, "train/loss")] == [(1, 3.0), (2, 2.0)]
    assert run.data.metrics["eval/loss"] == 1.0
    assert run.data.params["optim.learning_rate"] == "0.5"
    assert run.data.params["optim.betas"] == "[0.9, 0.95]"
    assert len(run.data.params["note"]) == 500


def test_nested_settings_have_dotted_keys() -> None:
    assert dict(flatten({"a": {"b": 1, "c": {"d": None}}, "e": {}})) == {"a.b": 1, "a.c.d": None, "e": {}}
