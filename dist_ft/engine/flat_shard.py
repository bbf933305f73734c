"""Checkpointing of tensors of which each rank holds a range of the flattened elements, as under ZeRO.

Torch Distributed Checkpoint describes a part of a tensor as a box: an offset and a size in each dimension. A range of
flattened elements is divided into boxes that are contiguous in it. They are saved as views, without gathering or
copying.
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
    """The elements `[start, start + len(own))` of a flattened tensor, which this rank holds.

    Args:
        own: The elements, `[n]`, possibly none; neither copied nor moved.
        shape: Shape of the whole tensor.
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
        """Refuse every operation, because this rank holds only a part of the elements."""
        raise NotImplementedError(f"{func} on a shard; use `own`")

    def __repr__(self) -> str:  # type: ignore[override]
        return f"FlatShard({tuple(self.shape)}, [{self.start}, {self.start + len(self.own)}), {self.own.device})"

    def to_local(self) -> Tensor:
        """Return the flattened elements of this rank; the counterpart of `DTensor.to_local`."""
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
    """Divide the elements `[start, stop)` of a flattened tensor into boxes, in order.

    There are at most `2 * len(shape) - 1` boxes.
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    row = math.prod(shape[1:])  # elements per index of the first dimension
    first, last = -(-start // row), stop // row  # complete rows
    if first > last:  # the range lies inside a single row
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
