"""The nouns that every family shares, and the six protocols between them.

A step: `Task.loss` turns a model and a `Batch` into a `LossSum`, a sum and its weight and never a mean, so that the
engine can divide by the weight of the whole global batch. See docs/design.md, "Laws".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:  # torch is slow to import, and the planner must not
    import numpy as np
    from torch import Tensor, nn

    from .schema_method import MethodChoice

Row = Mapping[str, Any]  # a row of data in its format's canonical shape, see data/formats.py
Example = Mapping[
    str, Sequence[int]
]  # a tokenised row: ragged integer columns, for language models input_ids and labels
Metrics = Mapping[str, float]


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one device.

    Causal language models get it without padding: the samples' documents one after another in one row of T tokens,
    with positions that restart and the documents' lengths for attention to keep them apart. Models whose attention
    cannot be told so get padded rows and an attention mask. Either way a target names the flat index of the token
    that predicts it, so a loss never depends on the layout.
    """

    inputs: dict[str, Any]  # keyword arguments of the model's forward
    targets: Tensor  # [n] int64: the supervised token ids (after the shift)
    positions: Tensor  # [n] int64: flat index, in input_ids.view(-1), of the token that predicts each target
    documents: Tensor  # [n] int64: which document of the micro-batch, from 0, each target belongs to
    tokens: int  # tokens without padding

    @property
    def supervised(self) -> int:
        """Number of positions that enter the loss."""
        return len(self.targets)

    @property
    def squared_lengths(self) -> int:
        """Sum of the documents' squared lengths, to which attention's work is proportional."""
        lengths = self.inputs.get("document_lengths") or self.inputs["attention_mask"].sum(dim=1).tolist()
        return sum(length * length for length in lengths)

    def to(self, device: Any) -> Batch:
        """The same micro-batch with its tensors on `device`."""
        moved = {k: v.to(device, non_blocking=True) if hasattr(v, "to") else v for k, v in self.inputs.items()}
        return replace(
            self,
            inputs=moved,
            targets=self.targets.to(device),
            positions=self.positions.to(device),
            documents=self.documents.to(device),
        )


@dataclass(frozen=True)
class LossSum:
    """A sum of token (or example) losses and how many there were; `counts` are further sums, for metrics.

    All tensors are scalars; what is added up over micro-batches and ranks stays exact, a quotient is taken last.
    """

    loss: Tensor
    weight: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step reports: the global gradient norm before clipping."""

    grad_norm: float


@dataclass(frozen=True)
class StepInfo:
    """What hooks see after a step; `metrics` bear the names of metrics.jsonl."""

    step: int
    total_steps: int
    metrics: Metrics


@dataclass
class NamedState:
    """Weights and optimizer moments by parameter name, the same names under every engine.

    `tensors` maps `model/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` to tensors or shards (DTensor); frozen weights
    are not in it. `updates` is the number of optimizer steps behind it, for AdamW's bias correction.
    """

    tensors: dict[str, Any]
    updates: int


LossFn = Callable[["nn.Module", Batch], LossSum]
ModelFactory = Callable[[bool], "nn.Module"]  # True: with the weights; False: the same modules, weights undefined
OptimFactory = Callable[[Iterable[tuple[str, "nn.Parameter"]]], Any]
Weights = Iterable[tuple[str, "Tensor"]]


class Engine(Protocol):
    """Owns parameters, gradients and updates; the loop never asks which one it is."""

    def setup(self, build_model: ModelFactory, build_optim: OptimFactory) -> None: ...
    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum: ...
    def step(self, learning_rate: float) -> StepStats: ...
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum: ...
    def state(self) -> NamedState: ...
    def load(self, state: NamedState) -> None: ...
    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]: ...


class Method(Protocol):
    """Which weights learn."""

    @property
    def config(self) -> MethodChoice: ...
    def apply(self, model: nn.Module) -> nn.Module: ...
    def export(self, model: nn.Module, weights: Weights, out: Path) -> None: ...


class Task(Protocol):
    """What is learned."""

    def encode(self, row: Row, tokenizer: Any) -> Example: ...
    def collate(self, samples: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> Batch: ...
    def loss(self, model: nn.Module, batch: Batch) -> LossSum: ...
    def score(self, model: nn.Module, batch: Batch) -> LossSum: ...
    def metrics(self, totals: LossSum) -> Metrics: ...


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics, *, step: int) -> None: ...
    def close(self) -> None: ...


class Hook(Protocol):
    """What else happens after a step."""

    def on_step(self, info: StepInfo) -> None: ...
