"""The nouns that every family shares, and the six protocols between them.

A step: `Task.loss` turns a model and a `Batch` into a `LossSum`, a sum and its weight and never a mean, so that the
engine can divide by the weight of the whole global batch. See docs/design.md, "Laws".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol, runtime_checkable

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from .config.method import MethodChoice


Row = Mapping[str, Any]  # a row of data in its format's canonical shape, see data/formats.py
Example = Mapping[str, Sequence[int]]  # one tokenised sequence: columns of whole numbers, input_ids among them
Prediction = Mapping[str, Any]  # what a model says of one sample, as JSON holds it; `sample` is its number in the split
Metrics = Mapping[str, float]
REFERENCE = "reference"  # column of a sequence: its log-probability under the model as it started
LOWER_IS_BETTER = ("loss", "perplexity", "calibration_error")  # of metrics; the others are better when higher


@dataclass(frozen=True)
class Facts:
    """What a task knows of its data beyond its own keys: found once, when the training split is prepared."""

    labels: tuple[str, ...] = ()  # names, in the order of their numbers
    label_counts: tuple[int, ...] = ()  # how often each stands in the training split
    pad_id: int = 0
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()  # what the tokenizer puts before a text
    suffix_ids: tuple[int, ...] = ()  # and behind it
    has_token_types: bool = False  # whether the tokenizer tells the texts of a pair apart by token_type_ids
    vocabulary: int = 0  # token ids are below
    rows: int = 0  # of the training split
    decoder_start_id: int = 0  # what an encoder-decoder's decoder reads first
    tokenizer_dir: str = ""
    new_tokens: tuple[str, ...] = ()  # that the configuration adds to the tokenizer
    new_token_ids: tuple[int, ...] = ()  # theirs
    resized_vocabulary: int = 0  # rows that the embeddings must be given for them; 0 where there are enough

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """What JSON has kept of facts."""
        found: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**found)


@dataclass(frozen=True)
class Architecture:
    """What a task needs of a model: its class, what its configuration must say, and whether its head begins anew."""

    auto_class: str = "AutoModelForCausalLM"  # of transformers
    overrides: Mapping[str, Any] = field(default_factory=dict)  # keys of the model's config.json
    new_head: bool = False  # what stands outside the base model learns the task, whichever the method
    vocabulary: int = 0  # rows that the embeddings are given, where added tokens need more; 0: as they are
    new_token_ids: tuple[int, ...] = ()  # of added tokens, whose rows learn under adapters too


CAUSAL_LM = Architecture()
ORIGIN = "origin"  # row column that data/split.py fills: which of the split's kept rows a sequence was made from


@dataclass(frozen=True)
class Layout:
    """How a task's rows become samples of a table (data/split.py)."""

    limits: Mapping[str, int]  # key of the configuration → most tokens of each sequence of a row, in their order
    columns: tuple[str, ...] = ("input_ids", "labels")  # one value a token
    row_columns: tuple[str, ...] = ()  # of a sequence as a whole, of any length
    id_columns: tuple[str, ...] = ("input_ids",)  # those that hold token ids
    sequences: int = 1  # that make a sample
    cuts_blocks: bool = False  # documents are cut, one after another, into full blocks
    packs: bool = False  # several samples are put into one, kept apart
    apart: bool = False  # the sequences of a sample are inputs of their own, which never see each other
    kept: tuple[str, ...] = ()  # columns of a row that its metrics need as they are


@dataclass(frozen=True)
class Sample:
    """What one place in a batch holds: sequences (or pieces of them) that never see each other."""

    segments: Sequence[Mapping[str, np.ndarray]]  # by column, [length] integers
    index: int  # in the split
    draw: int = 0  # how often the sample was seen before: what is drawn at random depends on (seed, index, draw)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one device.

    Causal language models get it without padding: the samples' documents one after another in one row of T tokens,
    with positions that restart and the documents' lengths for attention to keep them apart. Other models get padded
    rows and an attention mask. Either way a target names the row of the model's flattened output that predicts it, so
    a loss never depends on the layout.
    """

    inputs: dict[str, Any]  # keyword arguments of the model's forward
    targets: Tensor  # [n, …]: what is to be predicted, such as token ids (after the shift) or label numbers
    positions: Tensor  # [n] int64: which row of the output, flattened but for its last dimension, predicts each target
    documents: Tensor  # [n] int64: which document of the micro-batch, from 0, each target belongs to
    tokens: int  # tokens without padding
    samples: tuple[int, ...] = ()  # number in the split of each document's sample
    weight: float | None = None  # what the loss is divided by; the number of targets where it is not given
    reference: Tensor | None = None  # [documents] float64: their log-probabilities under the model as it started

    @property
    def supervised(self) -> int:
        """Number of targets that enter the loss."""
        return len(self.targets)

    @property
    def loss_weight(self) -> float:
        """This micro-batch's part of the step's denominator."""
        return float(self.supervised) if self.weight is None else self.weight

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
            reference=None if self.reference is None else self.reference.to(device),
        )

    def without_targets(self) -> Batch:
        """The same inputs with nothing to learn: for a rank that has no samples and must join in collectives."""
        none = {name: getattr(self, name)[:0] for name in ("targets", "positions", "documents")}
        reference = None if self.reference is None else self.reference[:0]
        return replace(self, **none, tokens=0, samples=(), weight=None, reference=reference)


@dataclass(frozen=True)
class LossSum:
    """A sum of losses of tokens (or examples) and its weight; `counts` are further sums, for metrics.

    These tensors are scalars; what is added up over micro-batches and ranks stays exact, a quotient is taken last.
    """

    loss: Tensor
    weight: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()  # where a metric is no quotient of sums
    losses: Tensor | None = None  # [n]: what each target of the batch (or pair) gives to `loss`, which is their sum
    weights: Tensor | None = None  # [n]: and to `weight`; 1 each where not given
    documents: Tensor | None = None  # [n]: the document of each; `Batch.documents` where not given


@dataclass(frozen=True)
class StepStats:
    """What an optimizer step reports: the global gradient norm before clipping, and what only some engines know."""

    grad_norm: float
    metrics: Metrics = field(default_factory=dict)


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


Say = Callable[[str], None]  # shows the user a line
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
    """What is learned. A task inherits from it what most have: no labels, and nothing to tell beyond metrics."""

    uses_facts: ClassVar[bool]  # whether it needs more of the data than its rows

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture: ...
    @staticmethod
    def labels_of(row: Row) -> Iterable[tuple[int | str, str | None]]:
        """Labels that a row gives, and the name of each that is a number, where the row has it."""
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
        """Tables beyond the metrics."""
        return {}


@runtime_checkable
class Refers(Protocol):
    """A task whose loss compares with the model as it starts: its log-probabilities are taken once (reference.py)."""

    def refer(self, model: nn.Module, batch: Batch) -> LossSum: ...  # a prediction a sample: `values` of its sequences


class Tracker(Protocol):
    """Where metrics go."""

    def log(self, metrics: Metrics, *, step: int) -> None: ...
    def close(self) -> None: ...


class Hook(Protocol):
    """What else happens after a step."""

    def on_step(self, info: StepInfo) -> None: ...


@dataclass(frozen=True)
class Progress:
    """What a checkpoint knows besides tensors; the data cursor is the step (data/order.py)."""

    step: int
    world_size: int
    engine: str
    tracker_id: str | None
    best_score: float | None  # of eval/<train.metric_for_best_model>
    best_step: int | None
    stale_evaluations: int  # evaluations since the best
