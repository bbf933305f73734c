"""Base class of tasks that wrap another task to add behavior."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class WrappedTask(Task):
    """A task that forwards every call to `inner`; subclasses override the methods that they extend.

    Attributes that are not in the protocol, such as `config` or `refer`, are those of `inner`.
    """

    def __init__(self, inner: Task) -> None:
        self.inner = inner

    def __getattr__(self, name: str) -> Any:
        if name == "inner":  # not set yet while the object is copied or unpickled
            raise AttributeError(name)
        return getattr(self.inner, name)

    @property
    def uses_facts(self) -> bool:  # type: ignore[override]
        """Whether the inner task needs facts of the data."""
        return self.inner.uses_facts

    def architecture(self, config: Any, facts: Facts) -> Architecture:  # type: ignore[override]
        """Return the inner task's architecture."""
        return self.inner.architecture(config, facts)

    def labels_of(self, row: Row) -> Iterable[tuple[int | str, str | None]]:  # type: ignore[override]
        """Return the inner task's labels of a row."""
        return self.inner.labels_of(row)

    @property
    def layout(self) -> Layout:
        """The inner task's layout."""
        return self.inner.layout

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Encode a row."""
        return self.inner.encode(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Encode a row, truncated to the limits of the task."""
        return self.inner.truncate(row, tokenizer)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Count the targets of each sample."""
        return self.inner.count_targets(table, samples)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples into a micro-batch."""
        return self.inner.collate(samples)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss of a micro-batch."""
        return self.inner.loss(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss of a micro-batch with counts and predictions for metrics."""
        return self.inner.score(model, batch)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute metrics from the sums over a split."""
        return self.inner.metrics(totals, rows)

    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Compute tables beyond the metrics."""
        return self.inner.details(totals, rows)
