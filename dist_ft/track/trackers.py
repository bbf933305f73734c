"""Builds the trackers of a run from its configuration."""

from __future__ import annotations

from typing import TextIO

from ..config.plan import METRICS_FILE, Plan
from ..process.place import Place
from ..state import Progress, Tracker
from .compose import NullTracker, Trackers
from .jsonl import JsonLines
from .progress import open_progress
from .wandb import open_wandb


def build_tracker(
    plan: Plan, place: Place, progress: Progress, steps: int, terminal: TextIO
) -> tuple[Tracker, str | None]:
    """Rank 0's trackers, and the W&B run's id; the other ranks track nothing."""
    if not place.is_main:
        return NullTracker(), progress.tracker_id
    config = plan.config
    wandb, identity = open_wandb(
        config.track,
        run_dir=plan.run_dir,
        run_name=config.run_name,
        # lines may hold secrets, and the seed is one
        settings=config.model_dump(mode="json", exclude={"launch": {"setup", "sbatch"}, "privacy": {"noise_seed"}}),
        run_id=progress.tracker_id,
        warn=lambda sentence: print(f"dist-ft: {sentence}", file=terminal, flush=True),
    )
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    return Trackers([lines, open_progress(steps, after_step=progress.step, file=terminal), wandb]), identity
