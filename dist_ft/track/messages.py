"""What a run says of itself: at its start, while it trains, and at its end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..config.plan import EXPORT, METRICS_FILE, Plan
from ..state import Progress
from .jsonl import read_evaluations, read_metrics

if TYPE_CHECKING:
    import torch

    from ..model.attention import AttentionChoice


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
    spent = [line["train/epsilon"] for line in read_metrics(plan.run_dir / METRICS_FILE) if "train/epsilon" in line]
    if spent:
        lines.append(f"dist-ft: epsilon {spent[-1]:.3f} is spent on the rows of data.train")
    lines.append(f"dist-ft: model in {plan.run_dir / EXPORT}, loaded again to the same logits")
    return "\n".join(lines)
