"""A frozen model in 4 or 8 bits (QLoRA: Dettmers et al. 2023): linear layers of the blocks, and fused experts.

A packed weight and its statistics are one frozen parameter under the weight's own name, viewed as the compute dtype.
Each engine moves it as it moves any other: DDP broadcasts it, FSDP2 and ZeRO-3 shard and gather it. The 16-bit weight
exists only while its layer computes, in the forward and again in the backward.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import RequestError
from .packing import import_bitsandbytes, pack, packed_size, unpack
from .quantized_experts import quantize_experts
from .structure import Packed, find_blocks, find_linears, find_mixtures, find_routers, unwrap

MOST_LEFT = 0.1  # of the blocks' matrices may be of another kind, such as convolutions or relative positions


class QuantizedLinear(nn.Linear):
    """A linear layer over packed bits; what wraps linear layers (peft) wraps it too.

    Args:
        in_features: as of `nn.Linear`.
        out_features: as of `nn.Linear`.
        scheme: `nf4` or `int8`.
        dtype: of the forward; the bits are viewed as it.
        bias: the layer's own, unquantised, or None.
        device: where to put the bits.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        scheme: str,
        dtype: torch.dtype,
        bias: nn.Parameter | None,
        device: torch.device,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.scheme = in_features, out_features, scheme
        self.packed = {"weight": Packed(scheme, (out_features, in_features))}
        size = packed_size(scheme, (out_features, in_features), dtype)
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", bias)

    def pack(self, weight: Tensor) -> None:
        """Quantise `weight` [out, in] into this layer's bits."""
        self.weight.data = pack(weight, self.scheme, self.weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in]: the weight that the forward uses."""
        return unpack(self.weight, *self.packed["weight"], dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self.weight, *self.packed["weight"])
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


class _Product(torch.autograd.Function):
    """x @ W.T with a W that is unpacked for the forward and again for the backward, and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scheme: str, shape: tuple[int, ...]) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.scheme, ctx.shape = scheme, shape
        return functional.linear(x, unpack(bits, scheme, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (bits,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ unpack(bits, ctx.scheme, ctx.shape, gradient.dtype), None, None, None


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
