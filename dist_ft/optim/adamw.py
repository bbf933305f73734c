"""AdamW with per-parameter weight decay and learning-rate scale."""

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
    """Build AdamW without weight decay for parameters that scale or shift single features.

    These are vectors (biases, norm weights, DoRA magnitudes) and matrices with a single row or column ((IA)^3 vectors,
    which are initialized to one, and LoRA factors of rank 1).

    Args:
        config: Optimizer configuration.
        parameters: Names and parameters to optimize.
        lr_scale: Returns the learning-rate multiplier of a parameter, given its name. Each parameter group stores it
            as `lr_scale`; engines set the learning rate of the group to that of the step times this value.
        **options: Further arguments of `torch.optim.AdamW`, such as `fused`.
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
