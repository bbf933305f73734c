"""Distribution of a step's samples over ranks and micro-batches."""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence

import numpy as np


def deal(
    indices: Sequence[int] | np.ndarray, lengths: np.ndarray, world: int, per_device: int
) -> list[list[list[int]]]:
    """Distribute the samples of a step over ranks and micro-batches with balanced token counts.

    Samples are assigned longest first, each to the micro-batch with the fewest tokens that is not full (Graham 1969,
    longest processing time first). Every rank gets the same number of micro-batches. In a partial step some
    micro-batches are empty.

    Args:
        indices: Sample indices of the step, `[num_samples]`.
        lengths: Number of tokens of every sample in the dataset.
        world: World size.
        per_device: Maximum number of samples per micro-batch.

    Returns:
        Sample indices nested by rank and micro-batch, in the order of the step.
    """
    chosen = np.asarray(indices, dtype=np.int64)
    micros = max(1, math.ceil(len(chosen) / (world * per_device)))
    bins: list[list[int]] = [[] for _ in range(world * micros)]
    # bin b is micro-batch b // world of rank b % world, so that a partial step fills one micro-batch per rank first
    heap = [(0, b) for b in range(len(bins))]
    sizes = np.asarray(lengths)[chosen]
    for place in np.argsort(-sizes, kind="stable").tolist():
        tokens, b = heapq.heappop(heap)
        bins[b].append(place)
        if len(bins[b]) < per_device:
            heapq.heappush(heap, (tokens + int(sizes[place]), b))
    filled = [[int(chosen[place]) for place in sorted(b)] for b in bins]
    return [[filled[micro * world + rank] for micro in range(micros)] for rank in range(world)]
