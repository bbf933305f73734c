"""Losses and scores of each set of a mixture, in addition to the total, exact over micro-batches and ranks.

In the sums, a set's value has the key `NAME@SET`, such as `loss@chat`; in metrics, `loss/chat`. A prediction names its
set under `set`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..process.comm import send
from ..process.sums import OF, flatten
from ..protocols import Task
from ..state import Batch, LossSum, Metrics, Row
from .wrapped import WrappedTask


class LossBySet(WrappedTask):
    """Adds the loss of each set to the counts of the inner task's loss.

    Args:
        inner: The task.
        sizes: Samples of each set of the training split, by name in their order.
    """

    def __init__(self, inner: Task, sizes: Mapping[str, int]) -> None:
        super().__init__(inner)
        self.sizes = sizes

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the inner task's loss with `loss@SET` and `weight@SET`."""
        result = self.inner.loss(model, batch)
        if result.losses is None:
            return result
        documents = batch.documents if result.documents is None else result.documents
        numbers = send(_set_numbers(batch, self.sizes), documents.device)[documents]
        weights = torch.ones_like(result.losses) if result.weights is None else result.weights
        # A selection by a mask would wait for the device.
        none = torch.zeros(len(self.sizes), dtype=torch.float64, device=documents.device)
        losses = none.index_add(0, numbers, result.losses.detach().double())
        totals = none.index_add(0, numbers, weights.detach().double())
        counts = dict(result.counts)
        for number, name in enumerate(self.sizes):
            counts[f"loss{OF}{name}"], counts[f"weight{OF}{name}"] = losses[number], totals[number]
        return replace(result, counts=counts)


class ScoreBySet(WrappedTask):
    """Adds the metrics of each set to those of the inner task.

    Micro-batches must hold samples of one set each, as `split_batches` yields them.

    Args:
        inner: The task.
        sizes: Samples of each set of the evaluated split, by name in their order.
    """

    def __init__(self, inner: Task, sizes: Mapping[str, int]) -> None:
        super().__init__(inner)
        self.sizes = sizes

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the inner task's scores with every sum repeated under the name of the micro-batch's set."""
        result = self.inner.score(model, batch)
        found = set(_set_numbers(batch, self.sizes).tolist())
        assert len(found) <= 1, "a micro-batch of an evaluation holds samples of one set"
        counts = dict(result.counts)
        for number, name in enumerate(self.sizes):  # every rank needs every name
            for key, value in flatten(result).items():
                counts[f"{key}{OF}{name}"] = value if number in found else torch.zeros_like(value)
        own = {"set": list(self.sizes)[found.pop()]} if found else {}
        return replace(result, counts=counts, predictions=[{**p, **own} for p in result.predictions])

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute the inner task's metrics over all sets and, as `NAME/SET`, over each."""
        found = dict(self.inner.metrics(_without_sets(totals), rows))
        ends = np.cumsum(list(self.sizes.values())).tolist()
        for name, first, end in zip(self.sizes, [0, *ends], ends, strict=False):
            own = {key.partition(OF)[0]: value for key, value in totals.counts.items() if key.endswith(OF + name)}
            predictions = [p for p in totals.predictions if first <= p["sample"] < end]
            part = LossSum(own.pop("loss"), own.pop("weight"), own, predictions)
            found |= {f"{key}/{name}": value for key, value in self.inner.metrics(part, rows).items()}
        return found

    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Compute the inner task's tables over all sets."""
        return self.inner.details(_without_sets(totals), rows)


def _without_sets(totals: LossSum) -> LossSum:
    return replace(totals, counts={key: value for key, value in totals.counts.items() if OF not in key})


def _set_numbers(batch: Batch, sizes: Mapping[str, int]) -> Tensor:
    """Return the index of the set of each document of the micro-batch, `[documents]` int64."""
    ends = np.cumsum(list(sizes.values()))
    return torch.from_numpy(np.searchsorted(ends, np.asarray(batch.samples, dtype=np.int64), side="right"))
