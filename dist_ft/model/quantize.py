"""Linear layers whose frozen weight is stored in 4 or 8 bits (QLoRA: Dettmers et al. 2023; int8 rows: Dettmers 2022).

bitsandbytes quantises and dequantises; what is stored is ours: packed weight and its statistics are the bytes of one
frozen parameter, viewed as the compute dtype. An engine that casts parameters by dtype has nothing to cast, and each
moves this one as it moves any other: DDP broadcasts it, FSDP2 and ZeRO-3 shard and gather it. The 16-bit weight exists
only while its layer computes, in the forward and again in the backward.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import MachineError, RequestError
from .structure import find_blocks, find_linears

BLOCK = 64  # weights that share a statistic
STATISTICS_BLOCK = 256  # statistics that share one of theirs (double quantisation)


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
        size = math.ceil(packed_bytes(scheme, out_features, in_features) / dtype.itemsize)
        self.weight = nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)
        self.register_parameter("bias", bias)

    def pack(self, weight: Tensor) -> None:
        """Quantise `weight` [out, in] into this layer's bits."""
        parts = _pack_nf4(weight) if self.scheme == "nf4" else _pack_int8(weight)
        data = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
        room = self.weight.numel() * self.weight.element_size()
        self.weight.data = functional.pad(data, (0, room - data.numel())).view(self.weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """[out, in]: the weight that the forward uses."""
        return unpack(self.weight, self.scheme, (self.out_features, self.in_features), dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] → [..., out]."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self.weight, self.scheme, (self.out_features, self.in_features))
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


class _Product(torch.autograd.Function):
    """x @ W.T with a W that is unpacked for the forward and again for the backward, and kept for neither."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bits: Tensor, scheme: str, shape: tuple[int, int]) -> Tensor:
        ctx.save_for_backward(bits)
        ctx.scheme, ctx.shape = scheme, shape
        return functional.linear(x, unpack(bits, scheme, shape, x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, None, None, None]:
        (bits,) = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ unpack(bits, ctx.scheme, ctx.shape, gradient.dtype), None, None, None


def quantize(model: nn.Module, scheme: str, dtype: torch.dtype, *, weights: bool) -> nn.Module:
    """Replace the linear layers of the blocks, in place; head, embeddings, norms and routers keep their precision.

    Args:
        model: on the CPU (or meta), in `dtype`.
        scheme: `nf4` or `int8`; `none` leaves the model as it is.
        dtype: of the forward.
        weights: whether the model holds its weights; else only shapes are made.

    Raises:
        MachineError: bitsandbytes is not installed.
        RequestError: a large part of the model is no linear layer, such as fused experts, and would stay as it is.
    """
    if scheme == "none":
        return model
    _import_bitsandbytes()
    _refuse_fused_experts(model, scheme)
    for name, linear in find_linears(model).items():
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
        model.set_submodule(name, layer)  # the 16-bit weight is freed here, layer by layer
    return model


def packed_bytes(scheme: str, out_features: int, in_features: int) -> int:
    """Bytes of a packed weight with its statistics."""
    if scheme == "int8":
        return out_features * in_features + 4 * out_features
    blocks = math.ceil(out_features * in_features / BLOCK)
    return math.ceil(out_features * in_features / 2) + blocks + 4 * math.ceil(blocks / STATISTICS_BLOCK) + 4


def unpack(bits: Tensor, scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """[out, in] in `dtype` from the bits that `QuantizedLinear.pack` made."""
    data = bits.detach().view(torch.uint8)
    return (_unpack_nf4 if scheme == "nf4" else _unpack_int8)(data, shape, dtype)


def _pack_nf4(weight: Tensor) -> list[Tensor]:
    """Half-byte codes, 8-bit statistics of blocks, float32 statistics of those, and their float32 offset."""
    codes, state = _import_bitsandbytes().quantize_4bit(
        weight.float().contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return [codes, state.absmax, state.state2.absmax.float(), state.offset.float().reshape(1)]


def _unpack_nf4(data: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    bnb = _import_bitsandbytes()
    dynamic_map, nf4_values = _tables(data.device)
    blocks = math.ceil(shape[0] * shape[1] / BLOCK)
    sizes = [math.ceil(shape[0] * shape[1] / 2), blocks, 4 * math.ceil(blocks / STATISTICS_BLOCK), 4]
    codes, absmax, scales, offset = data[: sum(sizes)].split(sizes)
    statistics = bnb.QuantState(
        absmax=_as_float(scales), code=dynamic_map, blocksize=STATISTICS_BLOCK,
        dtype=torch.float32,
    )  # fmt: skip
    state = bnb.QuantState(
        absmax=absmax.contiguous(), shape=torch.Size(shape), code=nf4_values,
        blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=_as_float(offset)[0], state2=statistics,
    )  # fmt: skip
    weight: Tensor = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
    return weight.reshape(shape)


@lru_cache(maxsize=4)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """The 256 values of an 8-bit statistic, and the 16 of NF4."""
    bnb = _import_bitsandbytes()
    return bnb.create_dynamic_map().to(device), bnb.get_4bit_type("nf4", device=device)


def _pack_int8(weight: Tensor) -> list[Tensor]:
    """Rows scaled to 127 by their largest magnitude, as bitsandbytes' `int8_vectorwise_quant` without outliers."""
    statistics = weight.float().abs().amax(dim=1).clamp_min(1e-12)
    return [torch.round(weight.float() * (127.0 / statistics[:, None])).to(torch.int8), statistics]


def _unpack_int8(data: Tensor, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    count = shape[0] * shape[1]
    codes, statistics = data[:count].view(torch.int8).reshape(shape), _as_float(data[count : count + 4 * shape[0]])
    return (codes.float() * (statistics[:, None] / 127.0)).to(dtype)


def _as_float(data: Tensor) -> Tensor:
    """float32 values from bytes that may stand anywhere in memory."""
    return data.clone().view(torch.float32)


def _refuse_fused_experts(model: nn.Module, scheme: str) -> None:
    fused = [p for block in find_blocks(model) for p in block.parameters() if p.ndim == 3]
    if fused:
        left = sum(p.numel() * p.element_size() for p in fused)
        total = sum(p.numel() * p.element_size() for p in model.parameters())
        rule = (
            f"{left / 2**30:.2f} of {total / 2**30:.2f} GiB are fused experts, which are no linear layers and would "
            f"stay unquantised under {scheme}"
        )
        raise RequestError.of("model.quantization", rule, "set model.quantization=none, and shard with engine=fsdp")


def _import_bitsandbytes() -> Any:
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError.of(
            "model.quantization", "needs the package bitsandbytes", "pip install 'dist-ft[gpu]'"
        ) from error
    return bitsandbytes.functional
