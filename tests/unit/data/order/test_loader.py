"""Tests of the loader: all ranks together see the same data as a single rank."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.data.order.loader import Loader, evaluation_batches
from dist_ft.data.order.order import Order
from dist_ft.data.store.pack import Samples, in_groups, pack_best_fit
from dist_ft.data.store.table import TokenTable
from dist_ft.state import Batch
from dist_ft.task.batches.tokens import collate_documents

LENGTHS = np.random.default_rng(3).integers(2, 30, 23)
TABLE = TokenTable.of(
    [
        {
            "input_ids": [row * 100 + t for t in range(n)],
            "labels": [-100] * (n // 2) + [row * 100 + t for t in range(n // 2, n)],
        }
        for row, n in enumerate(LENGTHS.tolist())
    ]
)


def targets(batches: list[Batch]) -> list[int]:
    return sorted(target for batch in batches for target in batch.targets.tolist())


def loaders(world: int, per_device: int, samples: Samples, global_batch: int = 8) -> list[Loader]:
    order = Order(len(samples), 0, True, global_batch, 20)
    return [
        Loader(TABLE, samples, collate_documents, order, rank=rank, world=world, per_device=per_device)
        for rank in range(world)
    ]


@pytest.mark.parametrize(("world", "per_device"), [(1, 8), (1, 2), (2, 4), (2, 1), (4, 2)])
@pytest.mark.parametrize("packed", [False, True])
def test_a_step_holds_the_same_targets_on_any_world(world: int, per_device: int, packed: bool) -> None:
    samples = pack_best_fit(LENGTHS, 64) if packed else in_groups(LENGTHS)
    alone = loaders(1, 8, samples)[0]
    ranks = loaders(world, per_device, samples)
    for step in (1, 2, 3):
        micros = [loader.step(step) for loader in ranks]
        assert len({len(micro) for micro in micros}) == 1
        assert targets([batch for micro in micros for batch in micro]) == targets(alone.step(step))
    assert targets(alone.step(1)) != targets(alone.step(2))


def test_an_empty_micro_batch_joins_in_without_targets() -> None:
    samples = in_groups(LENGTHS)
    order = Order(len(samples), 0, False, 3, 3)
    ranks = [Loader(TABLE, samples, collate_documents, order, rank=r, world=4, per_device=1) for r in range(4)]
    batches = [batch for loader in ranks for batch in loader.step(1)]
    assert len(batches) == 4
    filler = [batch for batch in batches if batch.supervised == 0]
    assert len(filler) == 1 and filler[0].tokens == 0
    assert filler[0].inputs["input_ids"].shape[1] == LENGTHS.min()
    assert len(filler[0].positions) == len(filler[0].documents) == 0


@pytest.mark.parametrize(("world", "per_device"), [(1, 4), (2, 3), (4, 2), (3, 16)])
def test_evaluation_sees_every_row_once(world: int, per_device: int) -> None:
    samples = in_groups(LENGTHS)
    ranks = [
        list(evaluation_batches(TABLE, samples, collate_documents, rank=r, world=world, per_device=per_device))
        for r in range(world)
    ]
    assert len({len(batches) for batches in ranks}) == 1
    seen = targets([batch for batches in ranks for batch in batches])
    expected = sorted(label for n in range(23) for label in TABLE.example(n)["labels"][1:].tolist() if label != -100)
    assert seen == expected
