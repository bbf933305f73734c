"""AdamW and its learning-rate schedule.

The rate of a step is a pure function of the step, so a checkpoint needs no schedule state and every engine follows
the same curve.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from ..config.optim import OptimConfig


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
