"""Which samples a step sees: a pure function of (number of samples, seed, step), never of world size or restarts.

All epochs are one infinite stream, permutation after permutation; step s takes the s-th global batch of it, so that
batches cross the borders of epochs and every step but perhaps the last is full.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from functools import lru_cache

import numpy as np


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


def permutation(samples: int, seed: int, epoch: int, number: int = 0) -> np.ndarray:
    """[samples] int64: a permutation keyed by (seed, epoch, number of the set).

    Sorted random words of Philox, the stream of which NumPy guarantees, unlike its own `permutation`.
    """
    key = np.array([seed % 2**64, number << 40 | epoch], dtype=np.uint64)
    return np.argsort(np.random.Philox(key=key).random_raw(samples), kind="stable")


def deal(
    indices: Sequence[int] | np.ndarray, lengths: np.ndarray, world: int, per_device: int
) -> list[list[list[int]]]:
    """Split the samples of a step over ranks and micro-batches so that each holds about as many tokens.

    The longest goes first, each to the micro-batch with the fewest tokens that has room for a row (Graham 1969,
    longest processing time). Every rank gets the same number of micro-batches; of a partial step some stay empty.

    Args:
        indices: the step's samples.
        lengths: tokens of every sample of the set.
        world: number of ranks.
        per_device: most samples of a micro-batch.

    Returns:
        rank → micro-batch → samples, in the step's order.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    micros = max(1, math.ceil(len(chosen) / (world * per_device)))
    bins: list[list[int]] = [[] for _ in range(world * micros)]
    # bin b is micro-batch b // world of rank b % world: what is left of a partial step goes round the ranks first
    heap = [(0, b) for b in range(len(bins))]
    sizes = np.asarray(lengths)[chosen]
    for place in np.argsort(-sizes, kind="stable").tolist():
        tokens, b = heapq.heappop(heap)
        bins[b].append(place)
        if len(bins[b]) < per_device:
            heapq.heappush(heap, (tokens + int(sizes[place]), b))
    filled = [[int(chosen[place]) for place in sorted(b)] for b in bins]
    return [[filled[micro * world + rank] for micro in range(micros)] for rank in range(world)]
