"""Quantization of a frozen model to 4 or 8 bits (QLoRA: Dettmers et al. 2023): linear layers and fused experts.

A packed weight and its statistics are stored as one frozen parameter under the name of the weight, viewed as the
compute dtype. Engines treat it as any other parameter: DDP broadcasts it, FSDP2 and ZeRO-3 shard and gather it. The
16-bit weight exists only while its layer computes, in the forward and again in the backward.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers.utils.logging import tqdm

from ..errors import RequestError
from ..state import Anatomy
from .anatomy import find_anatomy
from .quantization.experts import quantize_experts
from .quantization.linear import QuantizedLinear
from .quantization.packed import shapes_of
from .quantization.packing import import_bitsandbytes

UNPACKED_SHARE = 0.1  # maximum share of the blocks' matrices of kinds that cannot be packed, such as convolutions


def quantize(model: nn.Module, scheme: str, dtype: torch.dtype, *, weights: bool) -> nn.Module:
    """Pack the blocks' linear layers and fused experts in place; head, embeddings, norms and routers are unchanged.

    Args:
        model: Model in `dtype` on the CPU or the meta device.
        scheme: `nf4` or `int8`; `none` returns the model unchanged.
        dtype: Dtype of the forward.
        weights: Whether the model has its weights; otherwise, packed parameters are created but not filled.

    Raises:
        MachineError: bitsandbytes is not installed.
        RequestError: The model is already quantized, or a large part of it is of a kind that cannot be packed.
    """
    if scheme != "none":
        quantize_parts(find_anatomy(model), scheme, dtype, weights=weights)
    return model


def quantize_parts(anatomy: Anatomy, scheme: str, dtype: torch.dtype, *, weights: bool) -> None:
    """Quantize a model whose anatomy is known; see `quantize`."""
    model = anatomy.model
    import_bitsandbytes()
    if getattr(getattr(model, "config", None), "quantization_config", None):
        rule = f"{scheme} was requested, but the model's files are already quantized"
        raise RequestError.of("model.quantization", rule, "use the model that they were made from")
    linears = [name for name in anatomy.linears if isinstance(anatomy.part(name), nn.Linear)]
    fused = [part for mixture in anatomy.mixtures if mixture.fused for part in anatomy.parts(mixture.experts)]
    fused = [part for part in fused if any(len(shape) == 3 for shape in shapes_of(part, recurse=False))]
    _refuse_the_rest(anatomy, scheme, [*anatomy.parts(linears), *fused])
    for experts in tqdm(fused, desc="Packing experts", disable=not (weights and fused)):
        quantize_experts(experts, scheme, dtype, weights=weights)
    for name in tqdm(linears, desc="Packing weights", disable=not weights):
        model.set_submodule(name, _pack_linear(anatomy.part(name), scheme, dtype, weights=weights))


def _pack_linear(linear: nn.Module, scheme: str, dtype: torch.dtype, *, weights: bool) -> QuantizedLinear:
    assert isinstance(linear, nn.Linear)
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
    return layer


def _refuse_the_rest(anatomy: Anatomy, scheme: str, packed: list[nn.Module]) -> None:
    """Refuse a model of which a large part would remain in 16 bits, such as GPT-2 with its Conv1D layers."""
    routers = anatomy.parts(mixture.router for mixture in anatomy.mixtures)
    seen_to = {id(p) for module in packed for p in module.parameters(recurse=False)}
    seen_to |= {id(p) for router in routers for p in router.parameters()}
    matrices = {
        id(p): (p.numel() * p.element_size(), type(module).__name__)
        for block in anatomy.parts(anatomy.blocks)
        for module in block.modules()
        for p in module.parameters(recurse=False)
        if p.ndim > 1
    }
    total = sum(size for size, _ in matrices.values())
    left = [entry for key, entry in matrices.items() if key not in seen_to]
    unpacked = sum(size for size, _ in left)
    if unpacked > UNPACKED_SHARE * total or not packed:
        rule = (
            f"{unpacked / 2**20:,.2f} of the blocks' {total / 2**20:,.2f} MiB are neither called linear layers nor "
            f"fused experts ({', '.join(sorted({kind for _, kind in left}))}) and cannot be stored in {scheme}"
        )
        raise RequestError.of("model.quantization", rule, "set model.quantization=none, and shard with engine=fsdp")
