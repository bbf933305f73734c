"""TensorBoard: event files in the folder `tensorboard` of a run, with the metric names of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from torch.utils.tensorboard import SummaryWriter

from ..state import Metrics

FOLDER = "tensorboard"


class TensorBoard:
    """Tracker that writes event files.

    Args:
        run_dir: Folder of the run.
        settings: Configuration, shown as text.
        after_step: Step that the run resumes from; TensorBoard then hides what it had of later steps.
    """

    def __init__(self, run_dir: Path, settings: Mapping[str, Any], *, after_step: int = 0) -> None:
        self._writer: Any = SummaryWriter(str(run_dir / FOLDER), purge_step=after_step + 1 if after_step else None)
        text = yaml.safe_dump(dict(settings), sort_keys=False, allow_unicode=True)
        self._writer.add_text("configuration", f"```yaml\n{text}```", global_step=after_step)

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Write a scalar for each metric."""
        for name, value in metrics.items():
            self._writer.add_scalar(name, value, global_step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Close the file."""
        self._writer.close()
