"""Continued pre-training: every token of a document is predicted from those before it."""

from __future__ import annotations

from typing import Any

from ..state import Example, Row
from .language_model import LanguageModelTask


class CausalLM(LanguageModelTask):
    """The task `causal_lm`."""

    answers = False

    def tokens_of(self, row: Row, tokenizer: Any) -> Example:
        """`{"text"}` by `tokenizer.encode_text` (see data/template.py), `{"input_ids", "labels"}` as it is."""
        if "input_ids" in row:
            return {"input_ids": row["input_ids"], "labels": row["labels"]}
        example: Example = tokenizer.encode_text(row["text"])
        return example
