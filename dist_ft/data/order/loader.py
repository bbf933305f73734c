"""Micro-batches of one rank, for training and for evaluation."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain

import numpy as np

from ...state import Batch, Sample
from ..store.opened import Split
from ..store.pack import Samples
from ..store.table import TokenTable
from .deal import deal
from .order import Order


def split_batches(split: Split, collate: Collate, *, rank: int, world: int, per_device: int) -> Iterator[Batch]:
    """Micro-batches that hold every sample once over all ranks; of a mixture set after set."""
    table, samples = split.open_table(), split.open_samples()
    ends = np.cumsum(list(split.sizes.values()) or [len(samples)]).tolist()
    return chain.from_iterable(
        evaluation_batches(
            table, samples, collate, rank=rank, world=world, per_device=per_device, among=range(first, end)
        )
        for first, end in zip([0, *ends], ends, strict=False)
    )


Collate = Callable[[Sequence[Sample]], Batch]


class Loader:
    """This rank's micro-batches of every step; it has no state, so that a resumed run only asks for a later step.

    Args:
        table: the tokenised rows.
        samples: what a place in a batch holds.
        collate: the task's.
        order: which samples a step sees.
        rank: this rank.
        world: number of ranks.
        per_device: most samples of a micro-batch.
    """

    def __init__(
        self,
        table: TokenTable,
        samples: Samples,
        collate: Collate,
        order: Order,
        *,
        rank: int,
        world: int,
        per_device: int,
    ) -> None:
        self.table = table
        self.samples = samples
        self.collate = collate
        self.order = order
        self.rank = rank
        self.world = world
        self.per_device = per_device
        self.lengths = samples.lengths

    def step(self, step: int) -> list[Batch]:
        """The micro-batches of `step` (from 1); on every rank the same number, some without targets."""
        chosen, draws = self.order.step(step), self.order.draws(step)
        dealt = deal(np.arange(len(chosen)), self.lengths[chosen], self.world, self.per_device)[self.rank]
        pairs = [[(int(chosen[place]), int(draws[place])) for place in micro] for micro in dealt]
        return [_batch(self.table, self.samples, self.collate, micro, self.lengths) for micro in pairs]


def evaluation_batches(
    table: TokenTable,
    samples: Samples,
    collate: Collate,
    *,
    rank: int,
    world: int,
    per_device: int,
    among: range | None = None,
) -> Iterator[Batch]:
    """Micro-batches that hold every sample (`among` those) once over all ranks, on each rank the same number of them.

    The longest samples come first: samples of like length together need little padding, and memory runs out at once
    or not at all.
    """
    lengths = samples.lengths
    chosen = np.asarray(among if among is not None else range(len(lengths)), dtype=np.int64)
    ordered = chosen[np.argsort(-lengths[chosen], kind="stable")]
    for first in range(0, len(ordered), world * per_device):
        (micro,) = deal(ordered[first : first + world * per_device], lengths, world, per_device)[rank]
        yield _batch(table, samples, collate, [(index, 0) for index in micro], lengths)


def _batch(
    table: TokenTable, samples: Samples, collate: Collate, micro: Sequence[tuple[int, int]], lengths: np.ndarray
) -> Batch:
    """Collate samples, each with how often it was seen before.

    A rank without samples takes the shortest one without its targets, to join in collectives.
    """
    chosen = micro or [(int(np.argmin(lengths)), 0)]
    found = [Sample([table.example(*segment) for segment in samples[i]], i, draw) for i, draw in chosen]
    batch = collate(found)
    return batch if micro else batch.without_targets()
