"""The protocols between the folders; that of launchers is in launch/launcher.py."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

from .state import (
    Anatomy,
    Architecture,
    Batch,
    Beat,
    BuiltModel,
    Example,
    Facts,
    Layout,
    LossSum,
    Metrics,
    NamedState,
    Row,
    Sample,
    StepInfo,
    StepStats,
    Weights,
)

if TYPE_CHECKING:  # torch is slow to import, and planning does not need it
    import numpy as np
    import torch
    from torch import Tensor, nn

    from .config.method import MethodChoice
    from .model.head import OutputHead

LossFn = Callable[["nn.Module", Batch], LossSum]
OptimFactory = Callable[[Iterable[tuple[str, "nn.Parameter"]]], Any]


class Task(Protocol):
    """What is learned. The defaults are for a task without labels and without tables in addition to metrics."""

    uses_facts: ClassVar[bool]  # whether it needs `Facts` of the data

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture: ...
    @staticmethod
    def labels_of(row: Row) -> Iterable[tuple[int | str, str | None]]:
        """Return the labels of a row, each with its name where the label is a number and the row names it."""
        return ()

    @property
    def layout(self) -> Layout: ...
    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]: ...
    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]: ...
    def count_targets(self, table: Any, samples: Any) -> np.ndarray: ...
    def collate(self, samples: Sequence[Sample]) -> Batch: ...
    def loss(self, model: nn.Module, batch: Batch) -> LossSum: ...
    def score(self, model: nn.Module, batch: Batch) -> LossSum: ...
    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics: ...
    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Return tables beyond the metrics."""
        return {}


@runtime_checkable
class Refers(Protocol):
    """A task whose loss needs log-probabilities under the initial model, which assess/reference.py computes once."""

    def refer(self, model: nn.Module, batch: Batch) -> LossSum: ...  # one prediction per sample with its `values`


@runtime_checkable
class HasHead(Protocol):
    """A task that predicts tokens, whose losses the head of the model may compute in chunks (model/head.py)."""

    head: OutputHead | None


class Method(Protocol):
    """Which weights are trained, and how they are exported."""

    @property
    def config(self) -> MethodChoice: ...
    def apply(self, anatomy: Anatomy) -> nn.Module: ...
    def export(self, model: nn.Module, weights: Weights, out: Path) -> None: ...


@runtime_checkable
class Begins(Protocol):
    """A method that initializes its weights from those of the loaded model."""

    def begin(self, model: nn.Module, dtype: torch.dtype, tick: Beat) -> None: ...


class Engine(Protocol):
    """Owns parameters, gradients and updates; the loop does not depend on which engine it is.

    `setup` distributes the weights of rank 0; the other ranks pass the same modules without weights.
    """

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None: ...
    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum: ...
    def step(self, learning_rate: float) -> StepStats: ...
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum: ...
    def state(self) -> NamedState: ...
    def load(self, state: NamedState) -> None: ...
    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]: ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics, *, step: int) -> None: ...
    def close(self, error: BaseException | None = None) -> None:
        """Finish; `error` is what ended the run, None if it was trained to its end or stopped on request."""


class Hook(Protocol):
    """Additional actions before and after a step, on every rank. `after_step` returns further metrics."""

    def before_step(self, micros: Sequence[Batch]) -> None: ...
    def after_step(self, info: StepInfo) -> Metrics: ...
