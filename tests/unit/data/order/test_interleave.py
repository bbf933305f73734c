"""Tests of mixture interleaving: shares are kept, and the order depends only on sizes, shares, seed and step."""

from __future__ import annotations

import random
from fractions import Fraction

import numpy as np
import pytest

from dist_ft.data.order.interleave import PERIOD, Interleaving, MixedOrder, share_out
from dist_ft.data.order.loader import Loader
from dist_ft.data.order.order import Order
from dist_ft.data.store.pack import in_groups
from dist_ft.data.store.table import TokenTable
from dist_ft.task.batches.tokens import collate_documents

QUOTAS = [[1], [2, 1], [1, 1, 1], [7, 3], [90, 9, 1], [50, 5, 5, 5, 5, 5, 5, 5, 5, 5, 5], [60000, 1, 5000, 535]]


def stream(quotas: list[int], length: int) -> list[int]:
    return Interleaving(quotas).at(np.arange(length))[0].tolist()


@pytest.mark.parametrize("quotas", QUOTAS, ids=str)
def test_each_set_has_its_share_to_within_one_after_any_number_of_samples(quotas: list[int]) -> None:
    period = sum(quotas)
    sets = stream(quotas, min(3 * period, period + 5000))
    counts = [0] * len(quotas)
    for n, chosen in enumerate(sets, start=1):
        counts[chosen] += 1
        off = max(abs(Fraction(n * quota, period) - count) for quota, count in zip(quotas, counts, strict=True))
        assert off < 1, n


@pytest.mark.parametrize("quotas", [q for q in QUOTAS if len(q) > 1 and sum(q) < 200], ids=str)
def test_any_window_has_its_share_to_within_two_and_of_two_sets_to_within_one(quotas: list[int]) -> None:
    sets = np.asarray(stream(quotas, 2 * sum(quotas)))
    for number, quota in enumerate(quotas):
        ahead = np.concatenate(([0], np.cumsum(sets == number))) - np.arange(len(sets) + 1) * quota / sum(quotas)
        worst = ahead.max() - ahead.min()  # the largest deviation of any window
        assert worst <= (1 if len(quotas) == 2 else 2) + 1e-9


def test_random_quotas_keep_tijdemans_bound() -> None:
    dice = random.Random(5)
    for _ in range(100):
        quotas = [dice.randint(1, 40) for _ in range(dice.randint(2, 8))]
        sets, period = stream(quotas, sum(quotas)), sum(quotas)
        seen = np.cumsum(np.eye(len(quotas), dtype=int)[sets], axis=0)
        off = np.abs(seen - np.outer(np.arange(1, period + 1), quotas) / period).max()
        assert off <= 1 - 1 / (2 * len(quotas) - 2) + 1e-9, quotas


def test_places_and_counts_agree_with_counting() -> None:
    woven = Interleaving([3, 2, 2])
    sets, draws = woven.at(np.arange(40))
    for n in range(40):
        assert draws[n] == (sets[:n] == sets[n]).sum()
        assert woven.counts(n).tolist() == np.bincount(sets[:n], minlength=3).tolist()
    far = woven.at(np.array([10**12 + 3]))
    assert far[0] == woven.at(np.array([(10**12 + 3) % 7]))[0] and far[1] == woven.counts(10**12 + 3)[far[0]]


@pytest.mark.parametrize(
    ("sizes", "weights", "temperature", "expected"),
    [
        ([10, 1000], [0.8, 0.2], 1, [Fraction(4, 5), Fraction(1, 5)]),
        ([10, 1000], [3, 1], 1, [Fraction(3, 4), Fraction(1, 4)]),
        ([300, 100, 600], None, 1, [Fraction(3, 10), Fraction(1, 10), Fraction(6, 10)]),
        ([10, 1000], None, 2, [1 / 11, 10 / 11]),  # the ratio of the square roots is 1 to 10
        ([10, 1000], None, 1e9, [0.5, 0.5]),
        ([7], None, 1, [1]),
        ([10**7, 1], None, 1, [1, 0]),
    ],
)
def test_shares_follow_from_weights_or_sizes(
    sizes: list[int], weights: list[float] | None, temperature: float, expected: list[Fraction | float]
) -> None:
    quotas = share_out(sizes, weights, temperature)
    period = sum(quotas)
    assert period <= PERIOD and min(quotas) >= 1
    for quota, share in zip(quotas, expected, strict=True):
        if isinstance(share, Fraction):
            assert Fraction(quota, period) == share
        else:
            assert quota / period == pytest.approx(share, abs=1 / PERIOD)


def test_a_mixture_of_one_set_is_the_set() -> None:
    alone, mixed = Order(11, 4, True, 4, 40), MixedOrder([11], [1], 4, True, 4, 40)
    for step in range(1, 11):
        assert mixed.step(step).tolist() == alone.step(step).tolist()
        assert mixed.draws(step).tolist() == alone.draws(step).tolist()
        assert mixed.epoch_at(step) == alone.epoch_at(step)


def test_shares_by_size_see_every_sample_once_an_epoch() -> None:
    sizes = [30, 7, 13]
    order = MixedOrder(sizes, share_out(sizes, None, 1), 0, True, 8, 100)
    seen = np.concatenate([order.step(step) for step in range(1, 14)])
    assert len(seen) == 100
    for epoch in (seen[:50], seen[50:]):
        assert sorted(epoch.tolist()) == list(range(50))
    assert seen[:50].tolist() != seen[50:].tolist()


def test_each_set_goes_through_permutations_of_its_own() -> None:
    order = MixedOrder([6, 6], [1, 1], 3, True, 4, 48)
    seen = np.concatenate([order.step(step) for step in range(1, 13)])
    draws = np.concatenate([order.draws(step) for step in range(1, 13)])
    first, second = seen[seen < 6], seen[seen >= 6] - 6
    for walk in (first, second):
        assert (np.sort(walk.reshape(4, 6), axis=1) == np.arange(6)).all()
    assert first.tolist() != second.tolist()  # datasets of the same size have different permutations
    for sample in range(12):
        assert draws[seen == sample].tolist() == [0, 1, 2, 3]


def test_a_step_depends_neither_on_those_before_nor_on_the_end() -> None:
    early, late = (MixedOrder([40, 9], [2, 3], 1, True, 8, total) for total in (400, 80_000))
    list(map(early.step, range(1, 40)))
    assert early.step(44).tolist() == late.step(44).tolist()
    assert MixedOrder([40, 9], [2, 3], 2, True, 8, 400).step(44).tolist() != early.step(44).tolist()
    assert MixedOrder([5, 2], [1, 1], 1, False, 4, 40).step(2).tolist() == [2, 5, 3, 6]  # both datasets in file order


@pytest.mark.parametrize(("world", "per_device"), [(2, 4), (4, 1)])
def test_ranks_hold_together_what_one_holds_and_a_sample_that_comes_twice_is_drawn_twice(
    world: int, per_device: int
) -> None:
    rows = [{"input_ids": [row, row, row], "labels": [-100, row, row]} for row in range(12)]
    table, seen = TokenTable.of(rows), []
    order = MixedOrder([10, 2], [1, 3], 0, True, 8, 80)  # six of eight samples come from the dataset of two

    def collate(samples):  # type: ignore[no-untyped-def]
        seen.extend((sample.index, sample.draw) for sample in samples)
        return collate_documents(samples)

    def pairs(ranks: int, most: int) -> list[list[tuple[int, int]]]:
        samples = in_groups(table.lengths)
        found = []
        for step in (1, 2, 5):
            seen.clear()
            for rank in range(ranks):
                Loader(table, samples, collate, order, rank=rank, world=ranks, per_device=most).step(step)
            found.append(sorted(seen))
        return found

    alone = pairs(1, 8)
    assert pairs(world, per_device) == alone
    assert all(len(set(step)) == 8 and len({index for index, _ in step}) < 8 for step in alone)
