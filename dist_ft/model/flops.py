"""Floating-point operations of a training step, and what a device can do: the two halves of model FLOPs utilisation.

Counted as in PaLM (Chowdhery et al. 2022, appendix B): matrix products only, recomputation is not model work. Attention
is counted for each document's own length and causally, so that packing gains nothing on paper. Weights that are
frozen need no weight gradient: two thirds of the work of trained ones.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import nn

from .structure import find_blocks

# Dense bfloat16 peak in FLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


@dataclass(frozen=True)
class StepCost:
    """FLOP of forward and backward: `per_token * tokens + per_pair * sum(length ** 2)` over documents."""

    per_token: float
    per_pair: float

    def of(self, tokens: int, squared_lengths: int) -> float:
        """FLOP of `tokens` in documents whose squared lengths add up to `squared_lengths`."""
        return self.per_token * tokens + self.per_pair * squared_lengths


def count_step_cost(model: nn.Module) -> StepCost:
    """From the model's matrices: 2 FLOP a weight and token forward, as much for each of the two gradients.

    Embeddings are looked up and do not count; a tied head does, as a product. Experts are not resolved here: a
    mixture's fused experts are no linear layers, and its utilisation is left out by the caller.
    """
    frozen = trained = 0
    for module in model.modules():
        if isinstance(module, nn.Linear):
            if module.weight.requires_grad:
                trained += module.in_features * module.out_features
            else:
                frozen += module.in_features * module.out_features
    config = model.config
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1)
    # QK and AV: 2 products of 2 FLOP over half of the square forward, twice that backward.
    return StepCost(6.0 * trained + 4.0 * frozen, 3.0 * 2.0 * heads * width * len(find_blocks(model)))


def peak_flops(device: torch.device) -> float | None:
    """The device's dense bfloat16 peak in FLOP/s, or None where it is not known (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
