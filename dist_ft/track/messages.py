"""Messages that a run prints when it starts and when it ends."""

from __future__ import annotations

import datetime
import shlex
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..config.plan import EXPORT, METRICS_FILE, REPORT_FILE, Plan
from ..config.train import TrainConfig
from ..state import Progress
from .jsonl import read_evaluations, read_metrics

if TYPE_CHECKING:
    import torch

    from ..model.attention.choice import AttentionChoice


def describe(
    plan: Plan,
    attention: AttentionChoice,
    device: torch.device,
    progress: Progress,
    steps: int,
) -> Iterator[str]:
    """Describe the run in a few lines, including the values that `auto` settings resolved to.

    Args:
        plan: Plan of the run.
        attention: Attention kernel and layout of micro-batches, and the reason for choosing them.
        device: Device of this rank.
        progress: Progress of the run; step 0 for a new run.
        steps: Total number of steps.
    """
    config = plan.config
    layout = f"padded micro-batches ({attention.why_padded})"
    if attention.padding_free:
        layout = "padding-free micro-batches"
    base = config.model.dtype if config.model.quantization in (None, "none") else config.model.quantization
    begin = f"resuming from the checkpoint of step {progress.step}" if progress.step else "starting from step 0"
    yield (
        f"method {config.method.name}, model {config.model.name_or_path}, engine {config.engine.name}, "
        f"{plan.world_size} {device.type} worker(s), {steps} steps, {begin}; output directory {plan.run_dir}"
    )
    yield (
        f"compute dtype {config.model.dtype}, base weights {base}, trained weights and AdamW state float32; "
        f"attention {attention.kernel} ({attention.reason}), {layout}"
    )
    yield describe_saves(config.train, evaluates=config.data.has("validation"))


def describe_saves(train: TrainConfig, *, evaluates: bool) -> str:
    """Describe when checkpoints are saved and how many are kept, and by which keys that can be changed."""
    if not train.saves_on_the_way:
        return "saves a checkpoint after the last step only (train.save_steps, train.save_minutes)"
    minutes = train.minutes_between_saves
    times = [
        f"every {train.save_steps} steps" if train.save_steps else "",
        f"every {minutes:g} minutes" if minutes else "",
        "after each epoch (at most once a minute)" if train.saves_each_epoch else "",
        "at each best evaluation" if evaluates and train.eval_steps else "",
        "after the last step",
    ]
    kept = "all" if train.checkpoints_kept is None else f"the newest {train.checkpoints_kept}"
    best = " and the best" if evaluates and train.checkpoints_kept is not None else ""
    return (
        f"saves a checkpoint {', '.join(filter(None, times))}, and keeps {kept}{best} "
        "(train.save_steps, train.save_minutes, train.save_total_limit)"
    )


def summarize(plan: Plan, progress: Progress, seconds: float) -> Iterator[str]:
    """Summarize a finished run: time, evaluations, best step, spent privacy budget, and what to do with the model.

    Args:
        plan: Plan of the run.
        progress: Progress at the end of the run.
        seconds: Time since this start of the run.
    """
    before, after = read_evaluations(plan.run_dir / METRICS_FILE)
    changes = [f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in after if name in before and name != "step"]
    took = datetime.timedelta(seconds=round(seconds))
    yield f"trained {progress.step} steps, {took} since this start" + (": " + ", ".join(changes) if changes else "")
    if progress.best_step is not None:
        name = plan.config.train.metric_for_best_model
        yield f"best evaluation at step {progress.best_step}: eval/{name} {progress.best_score:.4f}"
    spent = [line["train/epsilon"] for line in read_metrics(plan.run_dir / METRICS_FILE) if "train/epsilon" in line]
    if spent:
        yield f"privacy budget spent on the rows of data.train: epsilon {spent[-1]:.3f}"
    yield f"model saved in {plan.run_dir / EXPORT}; the reloaded model has the same logits"
    if plan.config.track.report:
        yield f"report: {plan.run_dir / REPORT_FILE}"
    run = shlex.quote(f"run={plan.run_dir}")
    merge = "" if plan.config.method.whole else " merge=true"
    yield f"next: dist-ft generate {run}, or dist-ft export {run}{merge} out=FOLDER"
