"""Instruction tuning (supervised fine-tuning): only the tokens of the assistant's answers are supervised."""

from __future__ import annotations

from typing import Any

from ..state import Example, Row
from .language_model import LanguageModelTask


class Instruction(LanguageModelTask):
    """The task `instruction`."""

    answers = True

    def tokens_of(self, row: Row, tokenizer: Any) -> Example:
        """Tokenize messages, or a prompt and its completion; rows with `input_ids` and `labels` are kept as is."""
        if "input_ids" in row:
            return {"input_ids": row["input_ids"], "labels": row["labels"]}
        example: Example
        if "messages" in row:
            example = tokenizer.encode_messages(row["messages"], row.get("tools"), row.get("context", 0))
        else:
            example = tokenizer.encode_pair(row["prompt"], row["completion"])
        return example
