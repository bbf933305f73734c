"""A tensor of which each rank holds a range of its flattened elements, as under ZeRO, for checkpoints.

Torch Distributed Checkpoint knows parts of tensors as boxes: offsets and sizes in each dimension. A range of flattened
elements is a sequence of boxes, each contiguous in it, so that they can be views: no rank gathers or copies anything.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offsets and sizes


class FlatShard(Tensor):
    """This rank's elements `[start, start + len(own))` of a flattened tensor, where they live.

    Args:
        own: `[n]`: the elements, which are neither copied nor moved; possibly none.
        shape: Of the whole tensor.
        start: Index of the first element.
    """

    own: Tensor
    start: int

    @staticmethod
    def __new__(cls, own: Tensor, shape: Sequence[int], start: int) -> FlatShard:
        made: FlatShard = Tensor._make_wrapper_subclass(cls, torch.Size(shape), dtype=own.dtype, device=own.device)
        made.own, made.start = own, start
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:  # type: ignore[override]
        """Refuse to compute: only the elements of this rank are there."""
        raise NotImplementedError(f"{func} on a shard; use `own`")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard({tuple(self.shape)}, [{self.start}, {self.start + len(self.own)}), {self.own.device})"

    def to_local(self) -> Tensor:
        """Return the elements of this rank, flat, as `DTensor.to_local` does."""
        return self.own

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(offsets), torch.Size(sizes)) for offsets, sizes in self._boxes()]

    def __create_write_items__(self, name: str, held: Any) -> list[WriteItem]:
        properties = TensorProperties.create_from_tensor(self.own)
        return [
            WriteItem(
                index=MetadataIndex(name, chunk.offsets),
                type=WriteItemType.SHARD,
                tensor_data=TensorWriteData(chunk=chunk, properties=properties, size=self.size()),
            )
            for chunk in self.__create_chunk_list__()
        ]

    def __get_tensor_shard__(self, index: MetadataIndex) -> Tensor:
        at = 0
        for offsets, sizes in self._boxes():
            count = math.prod(sizes)
            if torch.Size(offsets) == index.offset:
                return self.own.narrow(0, at, count).view(sizes)
            at += count
        raise ValueError(f"{index} is not in {self!r}")

    def _boxes(self) -> list[Box]:
        return list(boxes_of(tuple(self.shape), self.start, self.start + len(self.own)))


def boxes_of(shape: tuple[int, ...], start: int, stop: int) -> Iterator[Box]:
    """Divide the elements `[start, stop)` of a flattened tensor into boxes of the tensor, in their order.

    There are at most `2 * len(shape) - 1` of them.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])  # elements of one index of the first dimension
    first, last = -(-start // row), stop // row  # the whole ones
    if first > last:  # within a single row, and not to its end
        yield from _in_row(shape, last, start - last * row, stop - last * row)
        return
    if start < first * row:
        yield from _in_row(shape, first - 1, start - (first - 1) * row, row)
    if first < last:
        yield (first, *(0,) * (len(shape) - 1)), (last - first, *shape[1:])
    if last * row < stop:
        yield from _in_row(shape, last, 0, stop - last * row)


def _in_row(shape: tuple[int, ...], index: int, start: int, stop: int) -> Iterator[Box]:
    for offsets, sizes in boxes_of(shape[1:], start, stop):
        yield (index, *offsets), (1, *sizes)
