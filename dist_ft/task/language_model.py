"""What tasks of causal language models share: layout, loss and metrics; a task adds how a row becomes tokens."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.task import CausalLMConfig, InstructionConfig
from ..data.read.faults import RowFault
from ..data.read.formats import IGNORED_LABEL
from ..data.store.pack import count_shifted
from ..state import CAUSAL_LM, Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample, Task

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class LanguageModelTask(Task):
    """A task over next-token prediction.

    torch is imported by the workers that need it, not where data is prepared.

    Args:
        config: the task's keys.
        facts: of the data.
        padding_free: lay documents out one after another, for models whose attention keeps them apart.
    """

    uses_facts: ClassVar[bool] = False
    answers: ClassVar[bool]  # whether a document is an answer, so that the share of exact ones means something

    def __init__(
        self, config: CausalLMConfig | InstructionConfig, facts: Facts | None = None, *, padding_free: bool
    ) -> None:
        self.config = config
        self.padding_free = padding_free

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture:
        """A causal language model with the head that it has."""
        return CAUSAL_LM

    @property
    def layout(self) -> Layout:
        """Token columns; documents are cut, or packed, or neither."""
        cuts = isinstance(self.config, CausalLMConfig) and self.config.packing
        return Layout(
            limits={"max_length": self.config.max_length},
            id_columns=("input_ids", "labels"),
            cuts_blocks=cuts,
            packs=self.config.packing,
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The row's tokens and labels; see `tokens_of`.

        Raises:
            RowFault: nothing can be learned from it.
        """
        return [check_supervised(self.tokens_of(row, tokenizer))]

    @abstractmethod
    def tokens_of(self, row: Row, tokenizer: Any) -> Example:
        """`input_ids` and `labels` of a row."""

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The first `max_length` tokens.

        Raises:
            RowFault: nothing supervised is among them.
        """
        example = self.tokens_of(row, tokenizer)
        cut = {name: values[: self.config.max_length] for name, values in example.items()}
        if not is_supervised(cut):
            raise RowFault("all that is supervised stands behind task.max_length", "raise task.max_length")
        return [cut]

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: positions that enter the loss."""
        return count_shifted(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A micro-batch."""
        from .batches import tokens

        return (tokens.collate_documents if self.padding_free else tokens.collate_padded)(samples)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sum of token losses and number of supervised tokens."""
        from .batches import tokens

        return tokens.sum_losses(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with counts for `metrics`."""
        from .batches import tokens

        return tokens.sum_scores(model, batch)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """loss, perplexity, token_accuracy; for answers exact_match, the share that greedy decoding gets right."""
        from .batches import tokens

        return tokens.metrics_of(totals, exact=self.answers)


def is_supervised(example: Example) -> bool:
    """Whether a label enters the loss: the first token's does not, as nothing predicts it."""
    return any(label != IGNORED_LABEL for label in example["labels"][1:])


def check_supervised(example: Example) -> Example:
    """The example.

    Raises:
        RowFault: no label enters the loss.
    """
    if not is_supervised(example):
        raise RowFault("no label but perhaps the first token's is supervised", "see its labels")
    return example
