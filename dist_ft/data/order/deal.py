"""How the samples of a step are divided over ranks and micro-batches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np


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
