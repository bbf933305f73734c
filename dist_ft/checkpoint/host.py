"""Copies in host memory of the tensors that this rank saves."""

from __future__ import annotations

import threading

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
        self._reserving: threading.Thread | None = None

    def reserve(self, plan: SavePlan, planner: SavePlanner) -> None:
        """Get the memory for the items of `plan` in a thread: the first save waits for the copy alone, as all others.

        The operating system gives memory page by page when it is first written to, which takes several times as long
        as a copy.
        """
        sources = {item.index: _source(planner, item) for item in plan.items}

        def touch() -> None:
            for index, source in sources.items():
                self._held[index] = _empty(source).zero_()

        self._reserving = threading.Thread(target=touch, name="reserve", daemon=True)
        self._reserving.start()

    def fill(self, plan: SavePlan, planner: SavePlanner) -> HostCopies:
        """Copy what `planner` gives for each item of `plan`, and return this object.

        Copies of tensors on a GPU are in page-locked memory, which all of them reach at once without blocking.
        """
        self._wait()
        held, self._held = self._held, {}
        on_gpu = False
        for item in plan.items:
            source = _source(planner, item)
            copy = held.pop(item.index, None)
            if copy is None or copy.shape != source.shape or copy.dtype != source.dtype:
                copy = _empty(source)
            self._held[item.index] = copy.copy_(source, non_blocking=source.is_cuda)
            on_gpu = on_gpu or source.is_cuda
        if on_gpu:
            torch.cuda.synchronize()
        return self

    def resolve_data(self, item: WriteItem) -> Tensor:
        """Return the copy of an item."""
        return self._held[item.index]

    def clear(self) -> None:
        """Free the memory."""
        self._wait()
        self._held = {}

    def _wait(self) -> None:
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None


def _source(planner: SavePlanner, item: WriteItem) -> Tensor:
    source = planner.resolve_data(item)
    assert isinstance(source, Tensor), "a state holds tensors only"
    return source.detach()


def _empty(source: Tensor) -> Tensor:
    return torch.empty_like(source, device="cpu", pin_memory=source.is_cuda)
