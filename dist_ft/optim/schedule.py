"""Learning-rate schedules.

The learning rate is a pure function of the step, so checkpoints hold no scheduler state and all engines use the same
schedule.
"""

from __future__ import annotations

import math

from ..config.optim import OptimConfig


def learning_rate(config: OptimConfig, step: int, total_steps: int) -> float:
    """Return the learning rate of `step`, which counts from 1 to `total_steps`.

    The schedules follow `get_*_schedule_with_warmup` in `optimization.py` of transformers, except for the warmup: in
    transformers, the first update has a learning rate of 0; here, the first of w warmup steps has 1/w of the peak
    learning rate, so that no step is wasted.
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
