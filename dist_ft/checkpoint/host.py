"""Copies in host memory of the tensors that this rank saves."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.planner import SavePlan, SavePlanner, WriteItem


class HostCopies:
    """The tensors of a plan, copied once; the memory is kept for the next save.

    The copies take the place of the planner that gave them: DCP's writer asks only for `resolve_data`.
    """

    def __init__(self) -> None:
        self._held: dict[MetadataIndex, Tensor] = {}

    def fill(self, plan: SavePlan, planner: SavePlanner) -> HostCopies:
        """Copy what `planner` gives for each item of `plan`, and return this object.

        Copies of tensors on a GPU are in page-locked memory, which all of them reach at once without blocking.
        """
        held, self._held = self._held, {}
        on_gpu = False
        for item in plan.items:
            source = planner.resolve_data(item)
            assert isinstance(source, Tensor), "a state holds tensors only"
            copy = held.pop(item.index, None)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = torch.empty_like(source.detach(), device="cpu", pin_memory=source.is_cuda)
            self._held[item.index] = copy.copy_(source.detach(), non_blocking=source.is_cuda)
            on_gpu = on_gpu or source.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return self

    def resolve_data(self, item: WriteItem) -> Tensor:
        """Return the copy of an item."""
        return self._held[item.index]

    def clear(self) -> None:
        """Free the memory."""
        self._held = {}
