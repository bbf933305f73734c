"""Weights that are made for a forward, dropped after it, and made again in the backward.

Autograd keeps a weight from the forward to the backward. For a weight that can be made again at any time (unpacked from
bits, merged with an adapter) it is handed a note of where to find it instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


class Lease:
    """The weights of one forward, and the same ones again for its backward; a context around the forward.

    Args:
        make: Returns the weight of a name; called in the forward, and again in the backward, without gradients.
    """

    def __init__(self, make: Callable[[str], Tensor]) -> None:
        self.make = make
        self.weights: dict[str, Tensor] = {}
        self.notes: Counter[str] = Counter()  # not fetched yet
        self.outer: tuple[Callable[..., Any], Callable[..., Any]] | None = None
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.note, self.fetch)

    def __enter__(self) -> Lease:
        """Hand notes to autograd from here on."""
        # Hooks replace those around them: what is not ours goes where activation checkpointing would have it.
        self.outer = torch._C._autograd._top_saved_tensors_default_hooks(False)
        self.hooks.__enter__()
        return self

    def __exit__(self, *failure: object) -> None:
        """Drop the weights."""
        self.hooks.__exit__(*failure)
        self.weights.clear()

    def weight(self, name: str) -> Tensor:
        """Return the weight, made at its first use."""
        if name not in self.weights:
            self.weights[name] = self.make(name)
        return self.weights[name]

    def note(self, tensor: Tensor) -> Any:
        """Return what autograd keeps of a tensor until the backward."""
        for name, weight in self.weights.items():
            if tensor.untyped_storage().data_ptr() == weight.untyped_storage().data_ptr():
                self.notes[name] += 1
                return _Note(self, name, tensor.size(), tensor.stride(), int(tensor.storage_offset()))
        return self.outer[0](tensor) if self.outer else tensor

    def fetch(self, kept: Any) -> Tensor:
        """Return the tensor again; the weight behind it is dropped when its last part has been fetched."""
        if not isinstance(kept, _Note) or kept.lease is not self:  # leases may be inside each other
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
    """A part of a weight, in place of the tensor itself."""

    lease: Lease
    name: str
    size: torch.Size
    stride: tuple[int, ...]
    offset: int
