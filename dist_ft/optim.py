"""AdamW and its learning-rate schedule.

The rate of a step is a pure function of the step, so a checkpoint needs no schedule state and every engine follows
the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from .schema import OptimConfig


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


def build_adamw(
    config: OptimConfig, parameters: Iterable[tuple[str, nn.Parameter]], **options: Any
) -> torch.optim.AdamW:
    """AdamW over named parameters; vectors (biases, norms, magnitudes) are not decayed."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for _, parameter in parameters:
        # Engines may have flattened or sharded it already; `ndim` of the tensor itself still tells a vector.
        (decayed if parameter.ndim > 1 else others).append(parameter)
    groups = [
        {"params": decayed, "weight_decay": config.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        [group for group in groups if group["params"]],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        **options,
    )
