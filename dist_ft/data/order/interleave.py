"""Interleaving of the datasets of a mixture, such that every prefix of the stream keeps each dataset's share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from fractions import Fraction

import numpy as np

from .order import Order

PERIOD = 1 << 16  # shares are exact if their period is at most this many samples, else rounded to 1 / PERIOD


def share_out(sizes: Sequence[int], weights: Sequence[float] | None, temperature: float) -> list[int]:
    """Return the number of samples of each dataset per period; the period is their sum.

    Args:
        sizes: Number of samples of each dataset.
        weights: Unnormalized shares. If None, shares are proportional to size^(1/temperature), as in mT5 (Xue et al.
            2021, section 3.1, with α = 1/temperature).
        temperature: With 1, all samples are equally frequent; towards infinity, all datasets are.
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
    while (left := PERIOD - sum(quotas)) != 0:  # largest remainder method; max(1, …) of tiny shares can make left < 0
        gaps = [share * PERIOD - quota for share, quota in zip(shares, quotas, strict=True)]
        chosen = gaps.index(max(gaps) if left > 0 else min(gaps))
        quotas[chosen] += 1 if left > 0 else -1
    return quotas


class Interleaving:
    """Infinite sequence of dataset indices that repeats with period `sum(quotas)`.

    After n samples, the count of dataset k differs from n * quotas[k] / period by at most 1 - 1 / (2 * num_sets - 2),
    so in any window it differs from its share by less than 2 (with two datasets, by at most 1).
    Source: Tijdeman 1980, "The chairman assignment problem", Discrete Mathematics 32.

    Args:
        quotas: Number of samples of each dataset per period, see `share_out`.
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
        """Return the dataset index of each position and the number of its earlier samples, both `[n]` int64."""
        rounds, places = np.divmod(positions, self.period)
        sets = self._sets[places]
        return sets, rounds * self.quotas[sets] + self._draws[places]

    def counts(self, samples: int) -> np.ndarray:
        """Return the number of samples of each dataset among the first `samples`, `[num_sets]` int64."""
        rounds, rest = divmod(samples, self.period)
        begun: np.ndarray = np.bincount(self._sets[:rest], minlength=len(self.quotas))
        return rounds * self.quotas + begun


def _assign(quotas: list[int]) -> list[int]:
    """Return one period of dataset indices by Tijdeman's rule, in exact integer arithmetic."""
    period, sets = sum(quotas), len(quotas)
    if sets == 1:
        return [0] * period
    scale = 2 * sets - 2
    owed = [0] * sets  # deficit of each dataset relative to its share, times the period
    chosen = []
    for _ in range(period):
        for number, quota in enumerate(quotas):
            owed[number] += quota
        # Among the eligible datasets, the one with the earliest deadline must be drawn to stay within the bound.
        due = [number for number in range(sets) if scale * owed[number] >= period]
        first = min(due, key=lambda k: (((scale - 1) * period - scale * owed[k]) / quotas[k], k))
        owed[first] -= period
        chosen.append(first)
    return chosen


class MixedOrder(Order):
    """Sample order of a mixture; sample indices run through the datasets one after another.

    Each dataset has its own permutations. An epoch has as many samples as all datasets together, so within an epoch a
    dataset whose share exceeds its size is repeated, and others are seen only in part.

    Args:
        sizes: Number of samples of each dataset.
        quotas: Number of samples of each dataset per period, see `share_out`.
        seed: Seed of the permutations.
        shuffle: Whether to use a new permutation for each pass over a dataset, instead of its stored order.
        global_batch_size: Number of samples per step.
        samples_total: Length of the stream in samples, see `total_steps`.
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
        """Return the sample indices of `step` (1-based), int64 of shape `[<= global_batch_size]`."""
        sets, draws = self.interleaving.at(self.positions(step))
        chosen = np.empty_like(draws)
        for number in np.unique(sets).tolist():
            here = sets == number
            chosen[here] = self.starts[number] + self.walk(int(self.sizes[number]), draws[here], number)
        return chosen

    def draws(self, step: int) -> np.ndarray:
        """Return how often each sample of `step` was seen before, int64 of the same shape as `self.step(step)`."""
        sets, draws = self.interleaving.at(self.positions(step))
        return draws // self.sizes[sets]
