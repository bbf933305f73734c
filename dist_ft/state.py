"""The records that the folders share.

`Task.loss` computes a `LossSum` from a model and a `Batch`: a sum with its weight and never a mean, so that the engine
can divide by the weight of the whole global batch. See docs/design.md, "Laws".
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:  # torch is slow to import, and planning does not need it
    import numpy as np
    from torch import Tensor, nn

Row = Mapping[str, Any]  # a row of data in the canonical shape of its format, see data/read/formats.py
Example = Mapping[str, Sequence[int]]  # one tokenized sequence: integer columns, among them input_ids
Prediction = Mapping[str, Any]  # JSON-serializable prediction for one sample; `sample` is its index in the split
Metrics = Mapping[str, float]
Weights = Iterable[tuple[str, "Tensor"]]
Say = Callable[[str], None]  # prints a line for the user
Beat = Callable[[str], None]  # reports to the watchdog what this rank has reached, see process/watchdog.py
REFERENCE = "reference"  # column of a sequence: its log-probability under the initial model
LOWER_IS_BETTER = ("loss", "perplexity", "calibration_error")  # metrics that improve when they fall


def unwatched(what: str) -> None:
    """Do nothing: the `Beat` of a process without a watchdog, such as a command or a test."""


@dataclass(frozen=True)
class Facts:
    """Facts about the data that a task needs in addition to its keys, found when the training split is prepared."""

    labels: tuple[str, ...] = ()  # label names, in the order of their ids
    label_counts: tuple[int, ...] = ()  # occurrences of each label in the training split
    pad_id: int = 0
    mask_id: int | None = None
    special_ids: tuple[int, ...] = ()
    prefix_ids: tuple[int, ...] = ()  # special tokens that the tokenizer adds before a text
    suffix_ids: tuple[int, ...] = ()  # and after it
    has_token_types: bool = False  # whether the tokenizer marks the texts of a pair by token_type_ids
    vocabulary: int = 0  # upper bound of token ids
    rows: int = 0  # of the training split
    decoder_start_id: int = 0  # the first input token of an encoder-decoder's decoder
    tokenizer_dir: str = ""
    new_tokens: tuple[str, ...] = ()  # tokens that model.add_tokens adds to the tokenizer
    new_token_ids: tuple[int, ...] = ()
    resized_vocabulary: int = 0  # size that the embeddings must be resized to; 0 if they are large enough

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Facts:
        """Restore facts from JSON."""
        found: dict[str, Any] = {n: tuple(value) if isinstance(value, list) else value for n, value in values.items()}
        return cls(**found)


@dataclass(frozen=True)
class Architecture:
    """What a task needs of a model."""

    auto_class: str = "AutoModelForCausalLM"  # of transformers
    overrides: Mapping[str, Any] = field(default_factory=dict)  # keys of the model's config.json
    new_head: bool = False  # modules outside the base model are randomly initialized and trained under every method
    vocabulary: int = 0  # size that the embeddings are resized to for added tokens; 0 keeps their size
    new_token_ids: tuple[int, ...] = ()  # ids of added tokens, whose embeddings are trained under adapters too


CAUSAL_LM = Architecture()
ORIGIN = "origin"  # row column filled by data/store/split.py: index of the kept row that a sequence was made from


@dataclass(frozen=True)
class RouterForm:
    """Where the raw logits and the chosen experts are in the outputs of a router."""

    logits_of: str  # module that returns the raw logits: the router, or a linear layer in it
    logits_at: int | None  # index of the raw logits in its outputs; None if they are the only output
    indices_at: int | None  # index of the chosen experts in the router's outputs; None if the largest logits are chosen
    sigmoid: bool  # scores are sigmoids and not a softmax (DeepSeek-V3)


@dataclass(frozen=True)
class Mixture:
    """A mixture of experts: a router, and the experts that it chooses from.

    The experts are modules with parameters for all experts (fused), usually `[experts, ..., ...]`, or one module per
    expert in a list or dictionary. Shared experts are not part of a mixture. All names are those of `named_modules()`
    of the model.
    """

    name: str  # module that contains both
    layer: int  # index of its block in `Anatomy.blocks`
    router: str
    experts: tuple[str, ...]
    num_experts: int
    top_k: int  # experts per token; all experts if unknown
    fused: bool
    form: RouterForm | None  # None if the routing cannot be measured
    why_unmeasured: str | None = None  # why `form` is None


@dataclass(frozen=True)
class Anatomy:
    """The parts of a model by name, found once by model/anatomy.py; `part` looks up a module.

    Methods replace modules in place (a linear layer by a LoRA layer around it). Looking up a name after a method was
    applied therefore returns the module that the model calls. `model` remains the same object, also inside a
    `PeftModel`.
    """

    model: nn.Module
    blocks: tuple[str, ...]  # the repeated layers, in order; of an encoder-decoder those of both stacks
    linears: tuple[str, ...]  # nn.Linear and Conv1D inside the blocks, without routers: what `all-linear` means
    norms: tuple[str, ...]  # normalization modules with a weight per feature
    mixtures: tuple[Mixture, ...]
    embeddings: str | None  # input embeddings
    head: str | None  # output embeddings; None if the model has none
    tied: bool  # whether input and output embeddings share their weight
    persistent_buffers: tuple[str, ...]  # buffers that checkpoint files hold, such as a router's correction bias
    task_head: tuple[str, ...] = ()  # randomly initialized modules of the task, trained under every method
    new_token_ids: tuple[int, ...] = ()  # ids of added tokens, whose embeddings are trained under every method
    lost_experts: str | None = None  # a count of experts in the configuration, if no router could be found
    idle: tuple[str, ...] = ()  # modules and parameters that no text reaches, in none of the above; never trained

    def part(self, name: str) -> nn.Module:
        """Return the module that has this name now."""
        return self.model.get_submodule(name)

    def parts(self, names: Iterable[str]) -> list[nn.Module]:
        """Return the modules that have these names now."""
        return [self.model.get_submodule(name) for name in names]

    def buffers(self) -> dict[str, Tensor]:
        """Return the persistent buffers by name."""
        return {name: self.model.get_buffer(name) for name in self.persistent_buffers}

    @property
    def token_rows(self) -> tuple[str, ...]:
        """Modules with one row per token: the input embeddings, and the head unless it is tied to them."""
        names = (self.embeddings, None if self.tied else self.head)
        return tuple(name for name in names if name is not None)


class BuiltModel(NamedTuple):
    """The model that a run trains, with its method applied, and the anatomy of the model inside it."""

    model: nn.Module
    anatomy: Anatomy


@dataclass(frozen=True)
class Layout:
    """How the rows of a task become samples of a token table (data/store/split.py)."""

    limits: Mapping[str, int]  # config key -> maximum tokens of each sequence of a row, in their order
    columns: tuple[str, ...] = ("input_ids", "labels")  # one value per token
    row_columns: tuple[str, ...] = ()  # values of a sequence as a whole, of any length
    id_columns: tuple[str, ...] = ("input_ids",)  # columns that hold token ids
    sequences: int = 1  # sequences per sample
    cuts_blocks: bool = False  # concatenated documents are cut into full blocks
    packs: bool = False  # several samples are packed into one, isolated from each other
    apart: bool = False  # the sequences of a sample are separate inputs that never attend to each other
    kept: tuple[str, ...] = ()  # columns of a row that its metrics need unchanged


@dataclass(frozen=True)
class Sample:
    """One sample of a batch: sequences (or parts of sequences) that never attend to each other."""

    segments: Sequence[Mapping[str, np.ndarray]]  # by column, [length] integers
    index: int  # in the split
    draw: int = 0  # how often the sample was seen before: random draws are a function of (seed, index, draw)


@dataclass(frozen=True)
class Batch:
    """One micro-batch on one device.

    Causal language models receive it without padding: the documents of the samples concatenated in one row of T tokens,
    with position ids that restart and the lengths of the documents, by which attention separates them. Other models
    receive padded rows and an attention mask. In both layouts a target names the row of the model's flattened output
    that predicts it, so that the loss does not depend on the layout.
    """

    inputs: dict[str, Any]  # keyword arguments of the model's forward
    targets: Tensor  # [n, ...]: what is predicted, such as token ids (after the shift) or label ids
    positions: Tensor  # [n] int64: the row of the output, flattened over all but the last dimension, for each target
    documents: Tensor  # [n] int64: the document of the micro-batch, from 0, that each target belongs to
    tokens: int  # number of tokens without padding
    samples: tuple[int, ...] = ()  # index in the split of each document's sample
    weight: float | None = None  # divisor of the loss; the number of targets if None
    reference: Tensor | None = None  # [documents] float64: log-probabilities under the initial model

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
        """Sum of the squared document lengths, to which the work of attention is proportional."""
        lengths = self.inputs.get("document_lengths") or self.inputs["attention_mask"].sum(dim=1).tolist()
        return sum(length * length for length in lengths)

    def to(self, device: Any) -> Batch:
        """Return the micro-batch with its tensors on `device`; the host does not wait for the copies to a GPU."""
        source = self.pinned() if str(device).startswith("cuda") else self
        return source._map(lambda tensor: tensor.to(device, non_blocking=True))

    def pinned(self) -> Batch:
        """Return the micro-batch in page-locked memory, from which copies to a GPU run beside everything else."""
        return self._map(lambda tensor: tensor if tensor.is_cuda else tensor.pin_memory())

    def _map(self, change: Callable[[Tensor], Tensor]) -> Batch:
        inputs = {name: change(value) if hasattr(value, "to") else value for name, value in self.inputs.items()}
        return replace(
            self,
            inputs=inputs,
            targets=change(self.targets),
            positions=change(self.positions),
            documents=change(self.documents),
            reference=None if self.reference is None else change(self.reference),
        )

    def without_targets(self) -> Batch:
        """Return the same inputs without targets, for a rank that has no samples and must join in collectives."""
        none = {name: getattr(self, name)[:0] for name in ("targets", "positions", "documents")}
        reference = None if self.reference is None else self.reference[:0]
        return replace(self, **none, tokens=0, samples=(), weight=None, reference=reference)


@dataclass(frozen=True)
class LossSum:
    """A sum of losses of tokens (or examples) and its weight; `counts` are further sums, for metrics.

    These tensors are scalars. They are summed over micro-batches and ranks before they are divided.
    """

    loss: Tensor
    weight: Tensor
    counts: dict[str, Tensor] = field(default_factory=dict)
    predictions: Sequence[Prediction] = ()  # for metrics that are not quotients of sums
    losses: Tensor | None = None  # [n]: loss of each target (or pair); `loss` is their sum
    weights: Tensor | None = None  # [n]: weight of each target; 1 if None
    documents: Tensor | None = None  # [n]: document of each target; `Batch.documents` if None


@dataclass(frozen=True)
class StepStats:
    """Results of an optimizer step: the global gradient norm before clipping, and metrics of some engines."""

    grad_norm: float
    metrics: Metrics = field(default_factory=dict)


@dataclass(frozen=True)
class StepInfo:
    """Cost of a step over all ranks."""

    step: int
    step_time_s: float
    tokens: int  # without padding
    squared_lengths: int  # see `Batch.squared_lengths`
    load_time_s: float = 0.0  # of this rank, for its micro-batches


@dataclass
class NamedState:
    """Weights and optimizer moments by parameter name, the same names under every engine.

    `tensors` maps `model/NAME`, `exp_avg/NAME` and `exp_avg_sq/NAME` to tensors or shards (DTensor); frozen weights
    are not included. `updates` is the number of optimizer steps taken, for AdamW's bias correction.
    """

    tensors: dict[str, Any]
    updates: int


@dataclass(frozen=True)
class Progress:
    """Content of a checkpoint besides tensors; the data cursor is the step (data/order/order.py)."""

    step: int
    world_size: int
    engine: str
    tracker_id: str | None
    best_score: float | None  # of eval/<train.metric_for_best_model>
    best_step: int | None
    stale_evaluations: int  # number of evaluations since the best one
    evaluation_pending: bool = False  # a stop interrupted the evaluation of `step`, which a resumed run makes first
    lineage: tuple[tuple[str, int], ...] = ()  # id of each start of the run that led here, and the step it began at
    settings: str | None = None  # hash of what may not change within a run, see config/run.py
    fingerprints: Mapping[str, Mapping[str, str]] = field(default_factory=dict)  # see checkpoint/fingerprints.py
    complete: bool = False  # training has ended at this step
    accepted: tuple[str, ...] = ()  # changes of data, model, tokenizer or template that the user accepted on the way

    def with_fingerprints(self, found: Mapping[str, Mapping[str, str]], accepted: tuple[str, ...] = ()) -> Progress:
        """Return this progress with other fingerprints, and with further accepted changes."""
        return replace(self, fingerprints=found, accepted=(*self.accepted, *accepted))
