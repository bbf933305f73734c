"""Weights that are computed for a forward, dropped after it, and recomputed in the backward.

Autograd saves a weight from the forward to the backward. For a weight that can be recomputed at any time (dequantized,
or merged with an adapter), a reference to it is saved instead, through `torch.autograd.graph.saved_tensors_hooks`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Lease:
    """Context of one forward, which provides its weights and recomputes them for its backward.

    Args:
        make: Computes the weight of a given name; called in the forward and again in the backward, without gradients.
    """

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        self.make = make
        self.weights: dict[str, Tensor] = {}
        self.notes: Counter[str] = Counter()  # by weight, references that the backward has not fetched yet
        self.outer: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, self.fetch)

    def __enter__(self) -> Lease:
        """Start saving references in place of weights."""
        # Inner hooks replace outer ones, so other tensors are passed on to those of activation checkpointing.
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.hooks.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        """Drop the weights."""
        self.hooks.__exit__(*failure)
        self.weights.clear()

    def weight(self, name: str) -> Tensor:
        """Return the weight; it is computed at the first use."""
        if name not in self.weights:
            self.weights[name] = self.make(name)
        return self.weights[name]

    def note(self, tensor: Tensor) -> Any:
        """Pack a tensor for autograd: a reference for a part of a weight, else the tensor itself."""
        for name, weight in self.weights.items():
            if tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
                self.notes[name] += 1
                return _Note(self, name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return self.outer[0](tensor) if self.outer else tensor

    def fetch(self, kept: Any) -> Tensor:
        """Unpack a saved tensor; a weight is dropped after its last reference was fetched."""
        if not isinstance(kept, _Note) or kept.lease is not self:  # leases may be nested
            tensor: Tensor = self.outer[1](kept) if self.outer else kept
            return tensor
        with torch.no_grad():
            weight = self.weight(kept.name)
        self.notes[kept.name] -= 1
        if self.notes[kept.name] <= 0:
            self.weights.pop(kept.name, None)
        return weight.as_strided(kept.size, kept.stride, kept.offset)


@dataclass(frozen=True)
class _Note:
    """Reference to a part of a weight, which autograd saves instead of the tensor."""

    lease: Lease
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
