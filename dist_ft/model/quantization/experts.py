"""Quantization of fused experts, the `[experts, ..., ...]` parameters of mixtures, to 4 or 8 bits.

Fused experts are not linear layers, so replacing linear layers would leave most of such a model in 16 bits. Here, the
parameter holds packed bits under its own name, which engines treat as any other parameter. During the forward of the
experts' own class, the attribute of that name is the dequantized weight. It is dropped after the forward and
dequantized again in the backward (`lease.py`).
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .lease import Lease
from .packed import Packed
from .packing import pack, packed_size, unpack


def quantize_experts(experts: nn.Module, scheme: str, dtype: torch.dtype, *, weights: bool) -> None:
    """Pack the fused parameters of `experts` in place; without weights, they are created but not filled."""
    packed = {n: Packed(scheme, tuple(p.shape)) for n, p in experts.named_parameters(recurse=False) if p.ndim == 3}
    for name, entry in packed.items():
        weight = getattr(experts, name)
        size = packed_size(scheme, entry.shape, dtype)
        bits = pack(weight.data, scheme, dtype) if weights else torch.empty(size, dtype=dtype, device=weight.device)
        experts.register_parameter(name, nn.Parameter(bits, requires_grad=False))
        del weight  # before the next one is packed
    experts.packed = packed  # type: ignore[assignment]
    kind: Any = type(experts)
    experts.__class__ = _quantized_class(kind, tuple(packed))


class QuantizedExperts:
    """Mixin for experts with quantized parameters."""

    packed: dict[str, Packed]
    _parameters: dict[str, nn.Parameter]

    def dequantize(self, name: str, dtype: torch.dtype | None = None) -> Tensor:
        """Return the dequantized weight of the forward, in the shape of the original parameter."""
        bits = self._parameters[name]
        return unpack(bits, *self.packed[name], dtype or bits.dtype)

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Run the experts' own forward with weights that are dequantized for its duration."""
        device = hidden_states.device.type
        half = torch.is_autocast_enabled(device)
        dtype = torch.get_autocast_dtype(device) if half else hidden_states.dtype
        lease = Lease(lambda name: self.dequantize(name, dtype))
        self.__dict__["lease"] = lease
        try:
            with lease:
                return super().forward(hidden_states, *args, **kwargs)  # type: ignore[misc]
        finally:
            del self.__dict__["lease"]


@lru_cache(maxsize=32)
def _quantized_class(base: Any, names: tuple[str, ...]) -> type[nn.Module]:
    """Return a subclass of `base` whose attributes `names` are weights in its forward, and packed parameters else."""

    def attribute(name: str) -> property:
        def read(self: Any) -> Any:
            lease = self.__dict__.get("lease")
            return lease.weight(name) if lease else self._parameters[name]

        return property(read)

    return type(f"Quantized{base.__name__}", (QuantizedExperts, base), {name: attribute(name) for name in names})
