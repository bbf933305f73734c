"""AdamW and its learning-rate schedule.

The rate of a step is a pure function of the step, so a checkpoint needs no schedule state and every engine follows
the same curve.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
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
    config: OptimConfig,
    parameters: Iterable[tuple[str, nn.Parameter]],
    lr_scale: Callable[[str], float] = lambda name: 1.0,
    **options: Any,
) -> torch.optim.AdamW:
    """AdamW over named parameters; what scales or shifts single features is not decayed.

    These are vectors (biases, norms, DoRA's magnitudes) and matrices with one row or one column ((IA)^3's factors,
    which start at one, and LoRA's of rank 1). Each group carries its `lr_scale`: engines set the group's rate to the
    step's rate times this.
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = {}
    for name, parameter in parameters:
        decay = config.weight_decay if sum(size > 1 for size in parameter.shape) > 1 else 0.0
        groups.setdefault((decay, lr_scale(name)), []).append(parameter)
    return torch.optim.AdamW(
        [{"params": held, "weight_decay": decay, "lr_scale": scale} for (decay, scale), held in groups.items()],
        lr=config.learning_rate,
        betas=config.betas,
        eps=config.eps,
        **options,
    )
