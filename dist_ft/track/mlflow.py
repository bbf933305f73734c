"""MLflow: a run in the experiment `track.project`, where MLFLOW_TRACKING_URI says, else in MLflow's own default."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from mlflow import MlflowClient
from mlflow.entities import Metric, Param

from ..state import Metrics

LONGEST_VALUE = 500  # characters of a parameter that every MLflow server takes
PARAMETERS_AT_ONCE = 100


class MLflow:
    """Tracker of an MLflow run. Metrics are sent by a thread of MLflow's.

    Args:
        experiment: Name of the experiment, created if missing.
        name: Name of the run.
        settings: Configuration; each value becomes a parameter `group.key`.
        run_id: Run to go on with; None starts a new one.
    """

    def __init__(self, experiment: str, name: str, settings: Mapping[str, Any], run_id: str | None = None) -> None:
        self._client = MlflowClient()
        self._sent: Any = None
        if run_id is not None:
            self.run_id = run_id
            self._client.update_run(run_id, status="RUNNING")
            return
        found = self._client.get_experiment_by_name(experiment)
        identity = found.experiment_id if found else self._client.create_experiment(experiment)
        self.run_id = self._client.create_run(identity, run_name=name).info.run_id
        parameters = [Param(key, str(value)[:LONGEST_VALUE]) for key, value in flatten(settings)]
        for i in range(0, len(parameters), PARAMETERS_AT_ONCE):
            self._client.log_batch(self.run_id, params=parameters[i : i + PARAMETERS_AT_ONCE])

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Send the metrics of a step."""
        now = int(time.time() * 1000)
        values = [Metric(name, value, now, step) for name, value in metrics.items()]
        self._sent = self._client.log_batch(self.run_id, metrics=values, synchronous=False)

    def close(self, error: BaseException | None = None) -> None:
        """Wait until all is sent, and end the run as finished or failed."""
        if self._sent is not None:
            self._sent.wait()
        self._client.set_terminated(self.run_id, "FINISHED" if error is None else "FAILED")


def flatten(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the values of nested settings with their dotted keys."""
    for key, value in settings.items():
        if isinstance(value, Mapping) and value:
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value
