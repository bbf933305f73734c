"""Trackio: a run in the project `track.project`, in Trackio's own folder (TRACKIO_DIR) or in a Space of the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import trackio

from ..state import Metrics


class Trackio:
    """Tracker of a Trackio run, which a resumed run goes on with by its name.

    Args:
        project: Name of the project.
        name: Name of the run.
        settings: Configuration to log.
        resumes: Whether the run goes on from a checkpoint.
    """

    def __init__(self, project: str, name: str, settings: Mapping[str, Any], *, resumes: bool = False) -> None:
        self._run: Any = trackio.init(
            project=project,
            name=name,
            config=dict(settings),
            resume="allow" if resumes else "never",
            embed=False,
            auto_log_gpu=False,
            auto_log_cpu=False,
        )

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log the metrics of a step."""
        self._run.log(dict(metrics), step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Finish the run, with an alert if an error ended it."""
        if error is not None:
            trackio.alert(title="run failed", text=str(error), level=trackio.AlertLevel.ERROR)
        self._run.finish()
