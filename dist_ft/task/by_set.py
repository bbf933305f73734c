"""Losses and scores of a mixture's sets beside those of all: sums that are exact over micro-batches and ranks.

In the sums a set's number stands under `NAME@SET`, such as `loss@chat`; in metrics under `loss/chat`. A prediction
names its set under `set`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..data.store.opened import Split
from ..process.sums import OF, flatten
from ..state import Batch, LossSum, Metrics, Row, Task


def split_losses(task: Task, train: Split) -> Task:
    """The same task, whose `loss` also counts the losses of each of the split's sets; itself where there are none."""
    if not (sizes := train.sizes):
        return task
    split: Any = copy.copy(task)

    def loss(model: nn.Module, batch: Batch) -> LossSum:
        result = task.loss(model, batch)
        if result.losses is None:
            return result
        documents = batch.documents if result.documents is None else result.documents
        numbers = _numbers(batch, sizes).to(documents.device)[documents]
        weights = torch.ones_like(result.losses) if result.weights is None else result.weights
        counts = dict(result.counts)
        losses = result.losses.detach().double()
        for number, name in enumerate(sizes):
            here = numbers == number
            counts[f"loss{OF}{name}"] = losses[here].sum()
            counts[f"weight{OF}{name}"] = weights[here].double().sum()
        return replace(result, counts=counts)

    split.loss = loss
    return split


def split_scores(task: Task, evaluated: Split | None) -> Task:
    """The same task, whose metrics are also told of each of the split's sets; itself where there are none.

    Batches must hold samples of one set each, as those of `split_batches` do.
    """
    if evaluated is None or not (sizes := evaluated.sizes):
        return task
    split: Any = copy.copy(task)
    ends = np.cumsum(list(sizes.values())).tolist()

    def score(model: nn.Module, batch: Batch) -> LossSum:
        result = task.score(model, batch)
        found = set(_numbers(batch, sizes).tolist())
        assert len(found) <= 1, "a batch of an evaluation is of one set"
        counts = dict(result.counts)
        for number, name in enumerate(sizes):  # every rank has every name
            for key, value in flatten(result).items():
                counts[f"{key}{OF}{name}"] = value if number in found else torch.zeros_like(value)
        own = {"set": list(sizes)[found.pop()]} if found else {}
        return replace(result, counts=counts, predictions=[{**p, **own} for p in result.predictions])

    def metrics(totals: LossSum, rows: Sequence[Row]) -> Metrics:
        plain = {key: value for key, value in totals.counts.items() if OF not in key}
        found = dict(task.metrics(replace(totals, counts=plain), rows))
        for name, first, end in zip(sizes, [0, *ends], ends, strict=False):
            own = {key.partition(OF)[0]: value for key, value in totals.counts.items() if key.endswith(OF + name)}
            predictions = [p for p in totals.predictions if first <= p["sample"] < end]
            part = LossSum(own.pop("loss"), own.pop("weight"), own, predictions)
            found |= {f"{key}/{name}": value for key, value in task.metrics(part, rows).items()}
        return found

    def details(totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        plain = {key: value for key, value in totals.counts.items() if OF not in key}
        return task.details(replace(totals, counts=plain), rows)

    split.score, split.metrics, split.details = score, metrics, details
    return split


def _numbers(batch: Batch, sizes: Mapping[str, int]) -> Tensor:
    """[documents] int64: the number of the set that each of the batch's documents is of."""
    ends = np.cumsum(list(sizes.values()))
    return torch.from_numpy(np.searchsorted(ends, np.asarray(batch.samples, dtype=np.int64), side="right"))
