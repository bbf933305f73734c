"""A frozen model in 4 or 8 bits (QLoRA: Dettmers et al. 2023): linear layers of the blocks, and fused experts.

A packed weight and its statistics are one frozen parameter under the weight's own name, viewed as the compute dtype.
Each engine moves it as it moves any other: DDP broadcasts it, FSDP2 and ZeRO-3 shard and gather it. The 16-bit weight
exists only while its layer computes, in the forward and again in the backward.
"""

from __future__ import annotations

import torch
from torch import nn

from ..errors import RequestError
from .anatomy import find_blocks, find_linears, find_mixtures, find_routers, unwrap
from .quantization.experts import quantize_experts
from .quantization.linear import QuantizedLinear
from .quantization.packing import import_bitsandbytes

MOST_LEFT = 0.1  # of the blocks' matrices may be of another kind, such as convolutions or relative positions


def quantize(model: nn.Module, scheme: str, dtype: torch.dtype, *, weights: bool) -> nn.Module:
    """Pack the blocks' linear layers and fused experts, in place; head, embeddings, norms and routers stay as they are.

    Args:
        model: on the CPU (or meta), in `dtype`.
        scheme: `nf4` or `int8`; `none` leaves the model as it is.
        dtype: of the forward.
        weights: whether the model holds its weights; else only shapes are made.

    Raises:
        MachineError: bitsandbytes is not installed.
        RequestError: the model is quantised already, or a large part of it is of a kind that would stay as it is.
    """
    if scheme == "none":
        return model
    import_bitsandbytes()
    if getattr(getattr(model, "config", None), "quantization_config", None):
        rule = f"{scheme} was asked for, and the model's own files are quantised already"
        raise RequestError.of("model.quantization", rule, "name the model that they were made from")
    linears = {name: layer for name, layer in find_linears(model).items() if isinstance(layer, nn.Linear)}
    fused = [unwrap(m.experts) for m in find_mixtures(model) if m.fused]
    _refuse_the_rest(model, scheme, [*linears.values(), *fused])
    for experts in fused:
        quantize_experts(experts, scheme, dtype, weights=weights)
    for name in list(linears):
        linear = linears.pop(name)  # the last to hold its 16-bit weight, which is freed before the next but one
        layer = QuantizedLinear(
            linear.in_features,
            linear.out_features,
            scheme=scheme,
            dtype=dtype,
            bias=linear.bias,
            device=linear.weight.device,
        )
        if weights:
            layer.pack(linear.weight.data)
        model.set_submodule(name, layer)
    return model


def _refuse_the_rest(model: nn.Module, scheme: str, packed: list[nn.Module]) -> None:
    """A model that would be called quantised and stay as it is, such as GPT-2 with its layers of another kind."""
    seen_to = {id(p) for module in (*packed, *find_routers(model)) for p in module.parameters(recurse=False)}
    matrices = {
        id(p): (p.numel() * p.element_size(), type(module).__name__)
        for block in find_blocks(model)
        for module in block.modules()
        for p in module.parameters(recurse=False)
        if p.ndim > 1
    }
    total = sum(size for size, _ in matrices.values())
    left = [entry for key, entry in matrices.items() if key not in seen_to]
    stays = sum(size for size, _ in left)
    if stays > MOST_LEFT * total or not packed:
        rule = (
            f"{stays / 2**20:,.2f} of the blocks' {total / 2**20:,.2f} MiB are neither linear layers nor fused experts "
            f"({', '.join(sorted({kind for _, kind in left}))}) and would stay as they are under {scheme}"
        )
        raise RequestError.of("model.quantization", rule, "set model.quantization=none, and shard with engine=fsdp")
