"""Boundaries of the documents of one padding-free row, made once for a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from ...process.comm import send


@dataclass(frozen=True)
class Boundaries:
    """Where the documents of a row of T tokens begin and end.

    Attributes:
        lengths: Tokens of each document; their sum is T.
        device: Where attention computes.
        masks: What kernels derive from the boundaries and keep for the other layers of the micro-batch.
    """

    lengths: tuple[int, ...]
    device: torch.device
    masks: dict[Any, Any] = field(default_factory=dict, compare=False)

    @property
    def longest(self) -> int:
        """Number of tokens of the longest document."""
        return max(self.lengths)

    @cached_property
    def ends(self) -> Tensor:
        """Cumulative lengths from 0 to T, `[documents + 1]` int32 on the device."""
        ends = torch.tensor((0, *self.lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        return send(ends, self.device)

    @cached_property
    def documents(self) -> Tensor:
        """Number of the document of each token, `[T]` int32 on the device."""
        numbers = torch.arange(len(self.lengths), dtype=torch.int32)
        return send(numbers.repeat_interleave(torch.tensor(self.lengths)), self.device)


_latest: Boundaries | None = None


def boundaries_of(lengths: tuple[int, ...], device: torch.device) -> Boundaries:
    """Return the boundaries of these documents; all layers of a micro-batch get the same object.

    They are compared by value, because FSDP2 copies the inputs of every block.
    """
    global _latest
    if _latest is None or (_latest.lengths, _latest.device) != (lengths, device):
        _latest = Boundaries(lengths, device)
    return _latest
