"""Continued pre-training: every token of a document is predicted from those before it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from ..schema import CausalLMConfig
from ..state import Batch, Example, LossSum, Metrics, Row

if TYPE_CHECKING:
    import numpy as np
    from torch import nn


class CausalLM:
    """The task `causal_lm`.

    Args:
        config: its keys.
        padding_free: lay documents out one after another, for models whose attention keeps them apart.
    """

    def __init__(self, config: CausalLMConfig, *, padding_free: bool) -> None:
        self.config = config
        self.padding_free = padding_free

    def encode(self, row: Row, tokenizer: Any) -> Example:
        """`{"text"}` by `tokenizer.encode_text` (see data/template.py), `{"input_ids", "labels"}` as it is."""
        if "input_ids" in row:
            return {"input_ids": row["input_ids"], "labels": row["labels"]}
        example: Example = tokenizer.encode_text(row["text"])
        return example

    def collate(self, samples: Sequence[Sequence[Mapping[str, np.ndarray]]]) -> Batch:
        """A micro-batch."""
        from . import tokens  # torch is imported by the workers that need it, not where data is prepared

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
        """loss, perplexity, token_accuracy."""
        from . import tokens

        return tokens.metrics_of(totals, exact=False)
