"""Which samples a step sees: a pure function of (number of samples, seed, step), never of world size or restarts.

All epochs are one infinite stream, permutation after permutation; step s takes the s-th global batch of it, so that
batches cross the borders of epochs and every step but perhaps the last is full.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .chance import random_words


def total_steps(
    samples: int, global_batch_size: int, max_steps: int | None, num_train_epochs: float | None
) -> tuple[int, int]:
    """Number of steps, and of samples that they see; one epoch where neither limit is given."""
    if max_steps is not None:
        return max_steps, max_steps * global_batch_size
    seen = max(1, math.ceil(samples * (1.0 if num_train_epochs is None else num_train_epochs) - 1e-6))
    return math.ceil(seen / global_batch_size), seen


class Order:
    """The samples of each step.

    Args:
        samples: how many there are.
        seed: of the permutations.
        shuffle: a new permutation each epoch; else the order in which they are.
        global_batch_size: samples of a step.
        samples_total: where the stream ends, see `total_steps`.
        sets: of which the samples are; see interleave.py for several.
    """

    def __init__(
        self, samples: int, seed: int, shuffle: bool, global_batch_size: int, samples_total: int, *, sets: int = 1
    ) -> None:
        assert samples > 0, "there is nothing to order"
        self.samples = samples
        self.seed = seed
        self.shuffle = shuffle
        self.global_batch_size = global_batch_size
        self.samples_total = samples_total
        self._permutation = lru_cache(maxsize=2 * sets)(permutation)  # a batch may take from two epochs of a set

    def positions(self, step: int) -> np.ndarray:
        """[up to global_batch_size] int64: where in the stream the samples of `step` stand, which counts from 1."""
        first = (step - 1) * self.global_batch_size
        return np.arange(first, min(first + self.global_batch_size, self.samples_total), dtype=np.int64)

    def step(self, step: int) -> np.ndarray:
        """[up to global_batch_size] int64: the samples of `step`."""
        return self.walk(self.samples, self.positions(step))

    def draws(self, step: int) -> np.ndarray:
        """[as many] int64: how often each of them was seen before, which is what depends on chance anew."""
        return self.positions(step) // self.samples

    def walk(self, samples: int, positions: np.ndarray, number: int = 0) -> np.ndarray:
        """[n] int64: what stands at `positions` of the endless stream of a set's samples; `number` is the set's."""
        epochs, places = np.divmod(positions, samples)
        if not self.shuffle:
            return places
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self._permutation(samples, self.seed, epoch, number)[places[here]]
        return chosen

    def epoch_at(self, step: int) -> float:
        """Epochs that are done after `step`."""
        return min(step * self.global_batch_size, self.samples_total) / self.samples


class PoissonOrder(Order):
    """Each sample is in a step by a throw of its own: a step has `global_batch_size` of them on average, or none.

    Args:
        samples: how many there are, at least `global_batch_size`.
        seed: of the throws, which are a function of (seed, step).
        global_batch_size: how many a step has on average.
        samples_total: how many the run is to see.
    """

    def __init__(self, samples: int, seed: int, global_batch_size: int, samples_total: int) -> None:
        super().__init__(samples, seed, True, global_batch_size, samples_total)
        assert global_batch_size <= samples, "a probability is at most 1"

    @property
    def rate(self) -> float:
        """The probability that a sample is in a step."""
        return self.global_batch_size / self.samples

    def step(self, step: int) -> np.ndarray:
        """[any number] int64: the samples of `step`, which counts from 1."""
        words = random_words("sampling", self.seed, step).random_raw(self.samples)
        return np.flatnonzero(words * 2.0**-64 < self.rate)

    def draws(self, step: int) -> np.ndarray:
        """[as many] int64: no two steps draw alike for a sample."""
        return np.full(len(self.step(step)), step - 1, dtype=np.int64)


def permutation(samples: int, seed: int, epoch: int, number: int = 0) -> np.ndarray:
    """[samples] int64: a permutation keyed by (seed, epoch, number of the set).

    Sorted random words of Philox, the stream of which NumPy guarantees, unlike its own `permutation`.
    """
    key = np.array([seed % 2**64, number << 40 | epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(samples), kind="stable")
