"""Floating-point operations of a training step and peak performance of a device, for model FLOPs utilization (MFU).

Counted as in PaLM (Chowdhery et al. 2022, appendix B): only matrix products, without recomputation. Attention is causal
and counted for the length of each document, so packing does not increase the count. Frozen weights need no weight
gradient and count two thirds of trained ones. Of a mixture's experts, only the chosen ones count.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from ..state import Anatomy, BuiltModel
from .quantization.packed import shapes_of
from .reach import lies_in

# Dense bfloat16 peak in FLOP/s, from the vendors' data sheets, by a part of the device's name.
PEAK_FLOPS = {"H200": 989.4e12, "H100": 989.4e12, "A100": 312e12, "L40S": 362e12, "A10G": 70e12, "L4": 121e12}


@dataclass(frozen=True)
class StepCost:
    """FLOP of forward and backward: `per_token * tokens + per_pair * sum(length ** 2)` over documents."""

    per_token: float
    per_pair: float

    def of(self, tokens: int, squared_lengths: int) -> float:
        """Return the FLOP of `tokens` in documents whose squared lengths add up to `squared_lengths`."""
        return self.per_token * tokens + self.per_pair * squared_lengths


def count_step_cost(built: BuiltModel) -> StepCost:
    """Count FLOP from the model's matrices: 2 per weight and token in the forward, and 2 for each of the two gradients.

    Embedding lookups do not count, but a tied head does. A token uses `top_k` of a mixture's experts, so their matrices
    and the adapters on them count by that share; routers and shared experts process every token. A low-rank adapter
    counts as its factors, however its product is computed. Every layer is assumed to attend to the whole document, so
    sliding windows are overestimated.
    """
    model, anatomy = built
    shares = {
        id(module): mixture.top_k / mixture.num_experts
        for mixture in anatomy.mixtures
        for experts in anatomy.parts(mixture.experts)
        for module in experts.modules()
    }
    routers = {id(module) for mixture in anatomy.mixtures for module in anatomy.part(mixture.router).modules()}
    idle = _replaced(model) | {id(m) for name, m in anatomy.model.named_modules() if lies_in(name, anatomy.idle)}
    frozen = trained = 0.0
    for module in model.modules():
        if id(module) in idle:
            continue
        share = shares.get(id(module), 1.0)
        for size, learns in _matrices(module, is_expert=id(module) in shares, is_router=id(module) in routers):
            trained, frozen = trained + share * size * learns, frozen + share * size * (not learns)
    # QK and AV: 2 FLOP per feature over half of the square forward, twice that backward.
    return StepCost(6.0 * trained + 4.0 * frozen, 3.0 * _attention_features(anatomy) * len(anatomy.blocks))


def _matrices(module: nn.Module, *, is_expert: bool, is_router: bool) -> list[tuple[int, bool]]:
    """Return the number of elements of each matrix that tokens are multiplied with, and whether it is trained."""
    if isinstance(module, nn.Linear):  # also a quantized one, whose parameter has a different size
        return [(module.in_features * module.out_features, module.weight.requires_grad)]
    if isinstance(module, Conv1D):
        return [(module.weight.numel(), module.weight.requires_grad)]
    dimensions = 3 if is_expert else 2 if is_router else 0
    sizes = zip(shapes_of(module, recurse=False), module.parameters(recurse=False), strict=True)
    return [(math.prod(shape), p.requires_grad) for shape, p in sizes if len(shape) == dimensions]


def _replaced(model: nn.Module) -> set[int]:
    """Return the ids of modules that are not called because peft trains a copy of them."""
    wrappers = [module for module in model.modules() if getattr(module, "modules_to_save", None)]
    originals = [getattr(wrapper, "original_module", None) for wrapper in wrappers]
    return {id(module) for original in originals if original is not None for module in original.modules()}


def _attention_features(anatomy: Anatomy) -> float:
    """Return the features of a layer's queries and values over all heads."""
    config: Any = anatomy.model.config
    if isinstance(config, PreTrainedConfig):
        config = config.get_text_config()
    heads = getattr(config, "num_attention_heads", 0)
    width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // max(heads, 1)
    values = getattr(config, "v_head_dim", None) or width
    # In latent attention (DeepSeek-V2, 2024, section 2.1) `head_dim` is only the rotary part.
    plain, rotated = getattr(config, "qk_nope_head_dim", None), getattr(config, "qk_rope_head_dim", None)
    queries = width if plain is None or rotated is None else plain + rotated
    return float(heads * (queries + values))


def peak_flops(device: torch.device) -> float | None:
    """Return the device's dense bfloat16 peak in FLOP/s, or None if it is unknown (a CPU, another GPU)."""
    if device.type != "cuda":
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for part, peak in PEAK_FLOPS.items() if part in name), None)
