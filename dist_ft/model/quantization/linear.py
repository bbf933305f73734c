"""A linear layer whose weight is stored packed in 4 or 8 bits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from .packed import Packed
from .packing import pack, packed_size, unpack


class QuantizedLinear(nn.Linear):
    """Linear layer with a packed weight; a subclass of `nn.Linear`, so that peft can adapt it.

    Args:
        in_features: As for `nn.Linear`.
        out_features: As for `nn.Linear`.
        scheme: `nf4` or `int8`.
        dtype: Dtype of the forward, as which the packed bits are viewed.
        bias: Unquantized bias of the layer, or None.
        device: Device of the packed bits.
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
        """Quantize `weight`, `[out, in]`, into this layer's packed bits."""
        self.weight.data = pack(weight, self.scheme, self.weight.dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantized weight of the forward, `[out, in]`."""
        return unpack(self.weight, *self.packed["weight"], dtype or self.weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        """Compute the output `[..., out]` of `x`, `[..., in]`."""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        product: Tensor = _Product.apply(x, self.weight, *self.packed["weight"])
        return product if self.bias is None else product + self.bias.to(product.dtype)

    def extra_repr(self) -> str:
        """Return the text that `print(model)` shows."""
        return f"{self.in_features}, {self.out_features}, {self.scheme}"


class _Product(torch.autograd.Function):
    """`x @ W.T` with a W that is unpacked in the forward and again in the backward, and never saved."""

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
