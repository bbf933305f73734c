"""Base class of the tasks for causal language models: layout, loss and metrics, but not the tokenization of rows."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.task import CausalLMConfig, InstructionConfig
from ..data.read.faults import RowFault
from ..data.read.formats import IGNORED_LABEL
from ..data.store.pack import count_shifted
from ..protocols import Task
from ..state import CAUSAL_LM, Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ..model.head import OutputHead


class LanguageModelTask(Task):
    """Base class of the tasks that train a causal language model with next-token prediction.

    Methods import torch lazily, because data preparation does not need it.

    Args:
        config: Task configuration.
        facts: Not used.
        padding_free: Whether to concatenate documents without padding; requires a model whose attention separates them.
    """

    head: OutputHead | None = None  # computes losses in chunks if set
    uses_facts: ClassVar[bool] = False
    answers: ClassVar[bool]  # whether documents are answers to prompts, for which exact_match is meaningful

    def __init__(
        self, config: CausalLMConfig | InstructionConfig, facts: Facts | None = None, *, padding_free: bool
    ) -> None:
        self.config = config
        self.padding_free = padding_free

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture:
        """Return the architecture: a causal language model with its pretrained head."""
        return CAUSAL_LM

    @property
    def layout(self) -> Layout:
        """Columns of the token table, and whether documents are cut into blocks or packed."""
        cuts = isinstance(self.config, CausalLMConfig) and self.config.packing
        return Layout(
            limits={"max_length": self.config.max_length},
            id_columns=("input_ids", "labels"),
            cuts_blocks=cuts,
            packs=self.config.packing,
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row; see `examples_of`.

        Raises:
            RowFault: If a sequence of the row has no supervised token.
        """
        return [check_supervised(example) for example in self.examples_of(row, tokenizer)]

    @abstractmethod
    def examples_of(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Return the `input_ids` and `labels` of a row's sequences, without truncation."""

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row, truncate its sequences to their first `max_length` tokens, and keep the supervised ones.

        Raises:
            RowFault: If none of these tokens is supervised.
        """
        size = self.config.max_length
        cut: list[Example] = [
            {name: values[:size] for name, values in example.items()} for example in self.examples_of(row, tokenizer)
        ]
        kept = [example for example in cut if is_supervised(example)]
        if not kept:
            raise RowFault("no token within the first task.max_length tokens is supervised", "raise task.max_length")
        return kept

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return the number of supervised tokens of each sample, `[samples]` int64."""
        return count_shifted(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples into a padding-free or a padded micro-batch."""
        from .batches import tokens

        return (tokens.collate_documents if self.padding_free else tokens.collate_padded)(samples)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the token losses and the number of supervised tokens."""
        from .batches import tokens

        return tokens.sum_losses(model, batch, self.head)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss and the counts that `metrics` needs."""
        from .batches import tokens

        return tokens.sum_scores(model, batch, self.head)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, `perplexity`, `token_accuracy` and, for answers to prompts, `exact_match`.

        `exact_match` is the fraction of answers that greedy decoding generates exactly.
        """
        from .batches import tokens

        return tokens.metrics_of(totals, exact=self.answers)


def is_supervised(example: Example) -> bool:
    """Return whether any token is supervised, except for the first one, which is never predicted."""
    return any(label != IGNORED_LABEL for label in example["labels"][1:])


def check_supervised(example: Example) -> Example:
    """Return the example unchanged if it has a supervised token.

    Raises:
        RowFault: If it has none.
    """
    if not is_supervised(example):
        raise RowFault("no token after the first one is supervised", "supervise at least one later token")
    return example
