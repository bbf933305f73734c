"""Sample order: a pure function of the number of samples, the seed and the step, independent of world size and resumes.

The epochs form one infinite stream of permutations, and step s takes the s-th global batch of it. Batches can therefore
span two epochs, and every step except possibly the last one is full.
"""

from __future__ import annotations

import math
from functools import lru_cache

import numpy as np

from .chance import random_words


def total_steps(
    samples: int, global_batch_size: int, max_steps: int | None, num_train_epochs: float | None
) -> tuple[int, int]:
    """Return the number of steps and of samples they process; one epoch if neither limit is given."""
    if max_steps is not None:
        return max_steps, max_steps * global_batch_size
    seen = max(1, math.ceil(samples * (1.0 if num_train_epochs is None else num_train_epochs) - 1e-6))
    return math.ceil(seen / global_batch_size), seen


class Order:
    """Sample order of a single dataset.

    Args:
        samples: Number of samples.
        seed: Seed of the permutations.
        shuffle: Whether to use a new permutation for each epoch, instead of the stored order.
        global_batch_size: Number of samples per step.
        samples_total: Length of the stream in samples, see `total_steps`.
        sets: Number of datasets; see interleave.py for several.
    """

    def __init__(
        self, samples: int, seed: int, shuffle: bool, global_batch_size: int, samples_total: int, *, sets: int = 1
    ) -> None:
        assert samples > 0, "there are no samples"
        self.samples = samples
        self.seed = seed
        self.shuffle = shuffle
        self.global_batch_size = global_batch_size
        self.samples_total = samples_total
        self._permutation = lru_cache(maxsize=2 * sets)(permutation)  # a batch may span two epochs of a dataset

    def positions(self, step: int) -> np.ndarray:
        """Return the stream positions of the samples of `step` (1-based), int64 of shape `[<= global_batch_size]`."""
        first = (step - 1) * self.global_batch_size
        return np.arange(first, min(first + self.global_batch_size, self.samples_total), dtype=np.int64)

    def step(self, step: int) -> np.ndarray:
        """Return the sample indices of `step` (1-based), int64 of shape `[<= global_batch_size]`."""
        return self.walk(self.samples, self.positions(step))

    def draws(self, step: int) -> np.ndarray:
        """Return how often each sample of `step` was seen before, which selects its random draws (such as masks).

        The result is int64 of the same shape as `self.step(step)`.
        """
        return self.positions(step) // self.samples

    def walk(self, samples: int, positions: np.ndarray, number: int = 0) -> np.ndarray:
        """Return the sample indices at `positions` of a dataset's infinite stream, `[n]` int64.

        Args:
            samples: Number of samples of the dataset.
            positions: Stream positions, `[n]` int64.
            number: Index of the dataset.
        """
        epochs, places = np.divmod(positions, samples)
        if not self.shuffle:
            return places
        chosen = np.empty_like(places)
        for epoch in np.unique(epochs).tolist():
            here = epochs == epoch
            chosen[here] = self._permutation(samples, self.seed, epoch, number)[places[here]]
        return chosen

    def epoch_at(self, step: int) -> float:
        """Return the number of epochs completed after `step`, as a fraction."""
        return min(step * self.global_batch_size, self.samples_total) / self.samples


class PoissonOrder(Order):
    """Poisson sampling: each step includes each sample independently with probability `rate`.

    The number of samples per step varies and can be zero.

    Args:
        samples: Number of samples, at least `global_batch_size`.
        seed: Seed of the draws, which are a function of seed and step.
        global_batch_size: Expected number of samples per step.
        samples_total: Expected number of samples of the whole run.
    """

    def __init__(self, samples: int, seed: int, global_batch_size: int, samples_total: int) -> None:
        super().__init__(samples, seed, True, global_batch_size, samples_total)
        assert global_batch_size <= samples, "the sampling probability must be at most 1"

    @property
    def rate(self) -> float:
        """Probability that a step includes a given sample."""
        return self.global_batch_size / self.samples

    def step(self, step: int) -> np.ndarray:
        """Return the sample indices of `step` (1-based), int64 of variable length."""
        words = random_words("sampling", self.seed, step).random_raw(self.samples)
        return np.flatnonzero(words * 2.0**-64 < self.rate)

    def draws(self, step: int) -> np.ndarray:
        """Return `step - 1` for each sample, so that its random draws differ in every step; int64."""
        return np.full(len(self.step(step)), step - 1, dtype=np.int64)


def permutation(samples: int, seed: int, epoch: int, number: int = 0) -> np.ndarray:
    """Return a permutation determined by seed, epoch and dataset index (`number`), `[samples]` int64.

    It sorts raw Philox words, because NumPy guarantees the stream of a bit generator but not that of
    `Generator.permutation`.
    """
    key = np.array([seed % 2**64, number << 40 | epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(samples), kind="stable")
