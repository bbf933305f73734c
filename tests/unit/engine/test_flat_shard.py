"""Tests of ranges of flattened tensors against torch's own indexing, and of checkpoints of them."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from dist_ft.engine.flat_shard import FlatShard, boxes_of

SHAPES = [(), (1,), (7,), (3, 4), (1, 5), (5, 1), (2, 3, 4), (2, 1, 3), (2, 2, 2, 3)]


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_boxes_are_the_elements_of_a_range_in_their_order(shape: tuple[int, ...]) -> None:
    count = math.prod(shape)
    numbers = torch.arange(count).view(shape)
    for start, stop in itertools.combinations_with_replacement(range(count + 1), 2):
        boxes = list(boxes_of(shape, start, stop))
        assert len(boxes) <= max(2 * len(shape) - 1, 1)
        parts = [
            numbers[tuple(slice(o, o + n) for o, n in zip(offsets, sizes, strict=True))] for offsets, sizes in boxes
        ]
        assert all(part.shape == sizes for part, (_, sizes) in zip(parts, boxes, strict=True))
        assert [int(n) for part in parts for n in part.flatten()] == list(range(start, stop))


def test_a_shard_is_a_view_of_what_is_held() -> None:
    held = torch.arange(12.0)
    shard = FlatShard(held[2:9], (3, 5), 4)
    assert shard.to_local().data_ptr() == held[2:].data_ptr()
    for chunk in shard.__create_chunk_list__():
        part = shard.__get_tensor_shard__(MetadataIndex("name", chunk.offsets))
        assert part.untyped_storage().data_ptr() == held.untyped_storage().data_ptr()
        part.fill_(-1.0)
    assert held.tolist() == [0, 1, *[-1] * 7, 9, 10, 11]
    assert FlatShard(torch.empty(7, device="meta"), (3, 5), 4).device.type == "meta"
    with pytest.raises(NotImplementedError, match="use `own`"):
        shard + 1


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_checkpoints_of_shards_and_of_whole_tensors_read_each_other(shape: tuple[int, ...], tmp_path: Path) -> None:
    count = math.prod(shape)
    whole = torch.arange(float(count)).view(shape) + 1
    dcp.save({"a": whole}, checkpoint_id=tmp_path / "whole", no_dist=True)
    for start, stop in {(0, count), (0, count // 2), (count // 3, count), (count // 2, count // 2)}:
        held = torch.zeros(stop - start)
        dcp.load({"a": FlatShard(held, shape, start)}, checkpoint_id=tmp_path / "whole", no_dist=True)
        assert torch.equal(held, whole.flatten()[start:stop])
    dcp.save({"a": FlatShard(whole.flatten(), shape, 0)}, checkpoint_id=tmp_path / "shards", no_dist=True)
    got = torch.zeros(shape)
    dcp.load({"a": got}, checkpoint_id=tmp_path / "shards", no_dist=True)
    assert torch.equal(got, whole)
