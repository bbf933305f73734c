"""Tests of the sample order: the samples of a step depend only on the dataset size, the seed and the step."""

from __future__ import annotations

import numpy as np
import pytest

from dist_ft.data.order.deal import deal
from dist_ft.data.order.order import Order, PoissonOrder, permutation, total_steps


@pytest.mark.parametrize(
    ("max_steps", "epochs", "expected"),
    [(None, None, (3, 10)), (7, None, (7, 28)), (None, 2, (5, 20)), (None, 0.5, (2, 5)), (None, 0.01, (1, 1)),
     (None, 1.1, (3, 11)), (None, 3.0, (8, 30))],
)  # fmt: skip
def test_steps_follow_from_the_limit(max_steps: int | None, epochs: float | None, expected: tuple[int, int]) -> None:
    assert total_steps(10, 4, max_steps, epochs) == expected


def test_steps_walk_through_whole_epochs() -> None:
    steps, rows = total_steps(10, 4, None, 3)
    order = Order(10, 1, True, 4, rows)
    stream = np.concatenate([order.step(s) for s in range(1, steps + 1)])
    assert [len(order.step(s)) for s in range(1, steps + 1)] == [4] * 7 + [2]
    epochs = stream.reshape(3, 10)
    assert (np.sort(epochs, axis=1) == np.arange(10)).all()
    assert len({tuple(epoch) for epoch in epochs.tolist()}) == 3
    assert [order.epoch_at(s) for s in (1, 5, 8)] == [0.4, 2.0, 3.0]


def test_a_step_does_not_depend_on_the_steps_before_it_or_on_the_end() -> None:
    one, other = Order(1000, 7, True, 32, 5000), Order(1000, 7, True, 32, 100_000)
    assert (one.step(100) == other.step(100)).all()
    assert (one.step(3) != Order(1000, 8, True, 32, 5000).step(3)).any()


def test_without_shuffling_it_is_the_file_order_again_and_again() -> None:
    order = Order(5, 0, False, 3, 12)
    assert [order.step(s).tolist() for s in (1, 2, 3, 4)] == [[0, 1, 2], [3, 4, 0], [1, 2, 3], [4, 0, 1]]


def test_permutations_are_pinned() -> None:
    """Different permutations would replay or skip rows in every resumed run."""
    assert permutation(8, 0, 0).tolist() == PINNED
    assert permutation(8, 0, 1).tolist() != PINNED


PINNED = [0, 2, 1, 5, 4, 3, 6, 7]


@pytest.mark.parametrize(
    ("world", "per_device", "rows"), [(1, 4, 8), (2, 2, 8), (4, 1, 16), (2, 4, 5), (4, 2, 3), (3, 2, 1)]
)
def test_dealing_keeps_the_rows_and_gives_every_rank_as_many_micro_batches(
    world: int, per_device: int, rows: int
) -> None:
    lengths = np.random.default_rng(rows).integers(1, 100, 50)
    indices = np.random.default_rng(1).permutation(50)[:rows]
    dealt = deal(indices, lengths, world, per_device)
    assert len(dealt) == world and len({len(rank) for rank in dealt}) == 1
    assert len(dealt[0]) == -(-rows // (world * per_device))
    flat = [sample for rank in dealt for micro in rank for sample in micro]
    assert sorted(flat) == sorted(indices.tolist())
    assert all(len(micro) <= per_device for rank in dealt for micro in rank)
    assert deal(indices, lengths, world, per_device) == dealt


def test_dealing_balances_tokens() -> None:
    lengths = np.array([100, 1, 1, 1, 100, 1, 1, 1])
    dealt = deal(np.arange(8), lengths, 2, 4)
    assert [sum(lengths[micro[0]]) for micro in dealt] == [103, 103]


def test_a_rank_with_few_rows_gets_them_before_a_second_micro_batch_elsewhere() -> None:
    dealt = deal(np.arange(2), np.array([3, 3]), 2, 2)
    assert [len(rank[0]) for rank in dealt] == [1, 1]


def test_rows_are_sampled_by_throws_of_their_own() -> None:
    order = PoissonOrder(400, 11, 32, 10_000)
    steps = [order.step(step) for step in range(1, 1001)]
    sizes = np.array([len(chosen) for chosen in steps])
    assert sizes.mean() == pytest.approx(32, rel=0.02)
    assert sizes.var() == pytest.approx(400 * 0.08 * 0.92, rel=0.15)  # binomial
    counts = np.bincount(np.concatenate(steps), minlength=400)
    assert counts.mean() == pytest.approx(80, rel=0.02) and counts.var() == pytest.approx(1000 * 0.08 * 0.92, rel=0.2)
    assert np.array_equal(order.step(7), PoissonOrder(400, 11, 32, 10_000).step(7))
    assert not np.array_equal(order.step(7), PoissonOrder(400, 12, 32, 10_000).step(7))
    assert len(order.draws(7)) == len(order.step(7))
    assert len(PoissonOrder(5, 0, 5, 10).step(1)) == 5


def test_ranks_share_a_step_of_any_size() -> None:
    order, lengths = PoissonOrder(40, 2, 2, 100), np.arange(1, 41)
    sizes = set()
    for step in range(1, 40):
        chosen = order.step(step)
        sizes.add(len(chosen))
        for world in (1, 2, 3):
            dealt = deal(chosen, lengths, world, 2)
            assert len({len(micros) for micros in dealt}) == 1
            assert sorted(row for micros in dealt for micro in micros for row in micro) == chosen.tolist()
    assert {0, 1, 2, 3} <= sizes
