"""The learning rate as a pure function of the step."""

from __future__ import annotations

import math

from ..config.optim import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """The rate of `step` (1-based) of `total_steps`.

    As transformers' `get_*_schedule_with_warmup` (optimization.py) set it for the same update: its first update uses
    rate 0 where there is a warm-up; here the first of w warm-up steps already uses 1/w of the rate, so that no step
    trains nothing.
    """
    warmup = math.ceil(config.warmup_ratio * total_steps)
    if step <= warmup:
        return config.learning_rate * step / warmup
    progress = (step - 1 - warmup) / max(1, total_steps - warmup)
    if config.lr_scheduler_type == "linear":
        return config.learning_rate * (1.0 - progress)
    if config.lr_scheduler_type == "cosine":
        return config.learning_rate * 0.5 * (1.0 + math.cos(math.pi * progress))
    return config.learning_rate
