"""Construction of the trackers of a run from its configuration."""

from __future__ import annotations

from typing import Any

from ..config.plan import METRICS_FILE, Plan
from ..process.place import Worker
from ..protocols import Tracker
from ..state import Progress
from .compose import NullTracker, Trackers
from .jsonl import JsonLines
from .progress import open_progress
from .wandb import open_wandb


def build_tracker(plan: Plan, progress: Progress, steps: int, worker: Worker) -> tuple[Tracker, str | None]:
    """Build the tracker of a rank.

    Args:
        plan: Plan of the run.
        progress: Progress of the run, with the W&B run ID to resume.
        steps: Total number of steps.
        worker: This worker; only rank 0 tracks metrics.

    Returns:
        The tracker, and the W&B run ID to store in checkpoints.
    """
    if not worker.place.is_main:
        return NullTracker(), progress.tracker_id
    config = plan.config
    wandb, identity = open_wandb(
        config.track,
        run_dir=plan.run_dir,
        run_name=config.run_name,
        settings=_settings(plan, progress),
        run_id=progress.tracker_id,
        warn=worker.say,
    )
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    return Trackers([lines, open_progress(steps, after_step=progress.step, file=worker.terminal), wandb]), identity


def _settings(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Return the configuration to log, with the changes that were accepted when the run was resumed."""
    # setup and sbatch lines may contain secrets, and the noise seed of differential privacy is one
    hidden = {"launch": {"setup", "sbatch"}, "privacy": {"noise_seed"}}
    changes = {"accepted_changes": list(progress.accepted)} if progress.accepted else {}
    return plan.config.model_dump(mode="json", exclude=hidden) | changes
