"""What tasks of causal language models share: layout, loss and metrics; a task adds how a row becomes tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from ..schema import CausalLMConfig, InstructionConfig
from ..state import Batch, LossSum, Metrics

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class LanguageModelTask:
    """A task over next-token prediction.

    torch is imported by the workers that need it, not where data is prepared.

    Args:
        config: the task's keys.
        padding_free: lay documents out one after another, for models whose attention keeps them apart.
    """

    answers: ClassVar[bool]  # whether a document is an answer, so that the share of exact ones means something

    def __init__(self, config: CausalLMConfig | InstructionConfig, *, padding_free: bool) -> None:
        self.config = config
        self.padding_free = padding_free

    def collate(self, samples: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> Batch:
        """A micro-batch."""
        from . import tokens

        return (tokens.collate_documents if self.padding_free else tokens.collate_padded)(samples)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sum of token losses and number of supervised tokens."""
        from . import tokens

        return tokens.sum_losses(model, batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with counts for `metrics`."""
        from . import tokens

        return tokens.sum_scores(model, batch)

    def metrics(self, totals: LossSum) -> Metrics:
        """loss, perplexity, token_accuracy; for answers exact_match, the share that greedy decoding gets right."""
        from . import tokens

        return tokens.metrics_of(totals, exact=self.answers)
