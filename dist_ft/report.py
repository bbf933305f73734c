"""What a run says of itself: at its start, while it trains, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TextIO

import torch

from .checkpoint import Progress
from .comm import Place
from .exported import EXPORT
from .model.attention import AttentionChoice
from .plan import Plan
from .state import Tracker
from .track.compose import NullTracker, Trackers
from .track.jsonl import METRICS_FILE, JsonLines, read_evaluations
from .track.progress import open_progress
from .track.wandb import open_wandb


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
        settings=config.model_dump(mode="json", exclude={"launch": {"setup", "sbatch"}}),  # lines may hold secrets
        run_id=progress.tracker_id,
        warn=lambda sentence: print(f"dist-ft: {sentence}", file=terminal, flush=True),
    )
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    return Trackers([lines, open_progress(steps, after_step=progress.step, file=terminal), wandb]), identity


def describe(
    plan: Plan,
    attention: AttentionChoice,
    device: torch.device,
    progress: Progress,
    steps: int,
    notes: Sequence[str] = (),
) -> str:
    """What runs, in a few lines: also what every `auto` became; `notes` are further ones."""
    config = plan.config
    layout = "documents without padding" if attention.padding_free else "padded rows"
    base = config.model.dtype if config.model.quantization in (None, "none") else config.model.quantization
    begin = f"from the checkpoint of step {progress.step}" if progress.step else "from the start"
    return (
        f"dist-ft: {config.method.name} of {config.model.name_or_path} by {config.engine.name} on {plan.world_size} "
        f"{device.type} worker(s), {steps} steps {begin}; output in {plan.run_dir}\n"
        f"dist-ft: compute {config.model.dtype}, base weights {base}, trained weights and AdamW float32; "
        f"attention {attention.kernel} ({attention.reason}), {layout}"
    ) + "".join(f"\ndist-ft: {note}" for note in notes)


def summarise(plan: Plan, step: int) -> str:
    """What came of it: the first and the last evaluation side by side, and where the model is."""
    before, after = read_evaluations(plan.run_dir / METRICS_FILE)
    changes = [f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in after if name in before and name != "step"]
    lines = [f"dist-ft: trained {step} steps" + (": " + ", ".join(changes) if changes else "")]
    lines.append(f"dist-ft: model in {plan.run_dir / EXPORT}, loaded again to the same logits")
    return "\n".join(lines)
