"""Loading of one rank's micro-batches for training and evaluation."""

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
    """Return an iterator over this rank's evaluation micro-batches of a split, one dataset of a mixture after another.

    Over all ranks, every sample is in exactly one micro-batch.
    """
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
    """Loader of this rank's training micro-batches, addressed by step.

    It is stateless: a resumed run only requests a later step.

    Args:
        table: Tokenized rows.
        samples: Samples as segments of rows.
        collate: Collate function of the task.
        order: Sample order.
        rank: This rank.
        world: World size.
        per_device: Maximum number of samples per micro-batch.
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
        """Return the micro-batches of `step` (1-based), the same number on every rank; some may have no targets."""
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
    """Yield this rank's evaluation micro-batches, the same number on every rank.

    Over all ranks, every sample is in exactly one micro-batch. Samples are sorted by descending length, which minimizes
    padding and makes an out-of-memory error occur in the first batch.

    Args:
        table: Tokenized rows.
        samples: Samples as segments of rows.
        collate: Collate function of the task.
        rank: This rank.
        world: World size.
        per_device: Maximum number of samples per micro-batch.
        among: Range of sample indices to evaluate. Defaults to all samples.
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
    """Collate `(sample, draw)` pairs, where `draw` is how often the sample was seen before.

    An empty micro-batch becomes the shortest sample without targets, so that the rank takes part in collectives.
    """
    chosen = micro or [(int(np.argmin(lengths)), 0)]
    found = [Sample([table.example(*segment) for segment in samples[i]], i, draw) for i, draw in chosen]
    batch = collate(found)
    return batch if micro else batch.without_targets()
