"""Causal language modeling (continued pre-training): each token of a document is predicted from the previous ones."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..state import Example, Row
from .language_model import LanguageModelTask


class CausalLM(LanguageModelTask):
    """The task `causal_lm`."""

    answers = False

    def examples_of(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize the text of a row; rows with `input_ids` and `labels` are kept as is."""
        if "input_ids" in row:
            return [{"input_ids": row["input_ids"], "labels": row["labels"]}]
        return [tokenizer.encode_text(row["text"])]
