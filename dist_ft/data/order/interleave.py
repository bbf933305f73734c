"""Which set each sample of a mixture comes from: every set keeps its share from the first sample on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .order import Order

PERIOD = 1 << 16  # shares are kept exactly where they repeat after so many samples, and to 1 / PERIOD elsewhere


def share_out(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float) -> list[int]:
    """How many of each period's samples every set gets; the period is their sum.

    Args:
        sizes: samples of each set.
        weights: shares in any unit; where they are not given, shares are as size^(1/temperature), as in mT5 (Xue et
            al. 2021, section 3.1, whose α is 1/temperature).
        temperature: 1 gives each sample of all sets the same chance, infinity each set.
    """
    if weights is not None:
        wanted = [Fraction(str(weight)) for weight in weights]
    elif temperature == 1:
        wanted = [Fraction(size) for size in sizes]
    else:
        largest = max(sizes)  # keeps powers in (0, 1]
        wanted = [Fraction((size / largest) ** (1 / temperature)) for size in sizes]
    shares = [weight / sum(wanted) for weight in wanted]
    period = math.lcm(*(share.denominator for share in shares))
    if period <= PERIOD:
        return [int(share * period) for share in shares]
    quotas = [max(1, math.floor(share * PERIOD)) for share in shares]
    while (left := PERIOD - sum(quotas)) != 0:  # largest remainders first; more than the period only of tiny shares
        gaps = [share * PERIOD - quota for share, quota in zip(shares, quotas, strict=True)]
        chosen = gaps.index(max(gaps) if left > 0 else min(gaps))
        quotas[chosen] += 1 if left > 0 else -1
    return quotas


class Interleaving:
    """An endless stream of sets that repeats after `sum(quotas)` samples.

    After n samples set k was drawn n * quotas[k] / period times, give or take less than one (exactly: no more than
    1 - 1 / (2 sets - 2)); so any window of the stream holds its share to within two, of two sets to within one.
    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32.
    """

    def __init__(self, quotas: Sequence[int]) -> None:
        self.quotas = np.asarray(quotas, dtype=np.int64)
        self.period = int(self.quotas.sum())
        self._sets = np.asarray(_assign([int(quota) for quota in quotas]), dtype=np.int64)
        self._draws = np.empty(self.period, dtype=np.int64)
        for number in range(len(self.quotas)):
            here = self._sets == number
            self._draws[here] = np.arange(here.sum())

    def at(self, positions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The set of each position, and how many samples of that set came before it; both [n] int64."""
        rounds, places = np.divmod(positions, self.period)
        sets = self._sets[places]
        return sets, rounds * self.quotas[sets] + self._draws[places]

    def counts(self, samples: int) -> np.ndarray:
        """[sets] int64: how many of the first `samples` are of each."""
        rounds, rest = divmod(samples, self.period)
        begun: np.ndarray = np.bincount(self._sets[:rest], minlength=len(self.quotas))
        return rounds * self.quotas + begun


def _assign(quotas: list[int]) -> list[int]:
    """Tijdeman's rule over one period, in whole numbers."""
    period, sets = sum(quotas), len(quotas)
    if sets == 1:
        return [0] * period
    scale = 2 * sets - 2
    owed = [0] * sets  # by how much each set is behind its share, times the period
    chosen = []
    for _ in range(period):
        for number, quota in enumerate(quotas):
            owed[number] += quota
        # Of the sets that may be drawn, the one that must be drawn soonest to keep within the bound.
        due = [number for number in range(sets) if scale * owed[number] >= period]
        first = min(due, key=lambda k: (((scale - 1) * period - scale * owed[k]) / quotas[k], k))
        owed[first] -= period
        chosen.append(first)
    return chosen


class MixedOrder(Order):
    """The samples of each step of a mixture; samples are numbered through, set after set.

    Each set goes through permutations of its own. An epoch is as many samples as all sets have together: by then a set
    with more than its part of the samples has been repeated, and one with less has been seen in part.

    Args:
        sizes: samples of each set.
        quotas: see `share_out`.
        seed: of the permutations.
        shuffle: a new permutation each time through a set; else the order in which its samples are.
        global_batch_size: samples of a step.
        samples_total: where the stream ends, see `total_steps`.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        quotas: Sequence[int],
        seed: int,
        shuffle: bool,
        global_batch_size: int,
        samples_total: int,
    ) -> None:
        super().__init__(sum(sizes), seed, shuffle, global_batch_size, samples_total, sets=len(sizes))
        self.sizes = np.asarray(sizes, dtype=np.int64)
        self.starts = np.cumsum(self.sizes) - self.sizes
        self.interleaving = Interleaving(quotas)

    def step(self, step: int) -> np.ndarray:
        """[up to global_batch_size] int64: the samples of `step`, which counts from 1."""
        sets, draws = self.interleaving.at(self.positions(step))
        chosen = np.empty_like(draws)
        for number in np.unique(sets).tolist():
            here = sets == number
            chosen[here] = self.starts[number] + self.walk(int(self.sizes[number]), draws[here], number)
        return chosen

    def draws(self, step: int) -> np.ndarray:
        """[as many] int64: how often each of them was seen before."""
        sets, draws = self.interleaving.at(self.positions(step))
        return draws // self.sizes[sets]
