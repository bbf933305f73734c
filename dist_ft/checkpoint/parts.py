"""What a rank has written, as JSON: which tensor, or part of one, is at which place of which file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.storage import WriteResult


def pack_results(results: Sequence[WriteResult]) -> list[Any]:
    """Return the results of DCP's writer as nested lists."""
    packed = []
    for result in results:
        index, place = result.index, result.storage_data
        offset = None if index.offset is None else list(index.offset)
        packed.append([index.fqn, offset, index.index, place.relative_path, place.offset, place.length])
    return packed


def unpack_results(packed: Sequence[Any]) -> list[WriteResult]:
    """Return the results that `pack_results` was given."""
    return [
        WriteResult(
            index=MetadataIndex(name, None if offset is None else torch.Size(offset), number),
            size_in_bytes=length,
            storage_data=_StorageInfo(file, start, length),
        )
        for name, offset, number, file, start, length in packed
    ]
