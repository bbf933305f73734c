"""Construction of the trackers of a run from its configuration."""

from __future__ import annotations

from typing import Any

from ..config.plan import LOG_DIR, METRICS_FILE, Plan
from ..process.place import Worker
from ..protocols import Tracker
from ..state import Progress
from .compose import NullTracker, Trackers
from .jsonl import JsonLines
from .progress import open_log_of_progress, open_progress
from .report import open_report
from .secrets import shown_settings


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
    wandb: Tracker = NullTracker()
    identity = progress.tracker_id
    if config.track.wandb != "off":
        from .wandb import open_wandb  # W&B takes a while to import

        wandb, identity = open_wandb(
            config.track,
            run_dir=plan.run_dir,
            run_name=config.run_name,
            settings=_settings(plan, progress),
            run_id=progress.tracker_id,
            warn=worker.say,
        )
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    shown = open_progress(steps, after_step=progress.step, file=worker.terminal)
    logged = open_log_of_progress(steps, plan.run_dir / LOG_DIR)
    return Trackers([lines, shown, logged, wandb, open_report(config.track, plan.run_dir)]), identity


def _settings(plan: Plan, progress: Progress) -> dict[str, Any]:
    """Return the configuration to log, with the changes that were accepted when the run was resumed."""
    changes = {"accepted_changes": list(progress.accepted)} if progress.accepted else {}
    return shown_settings(plan.config) | changes
