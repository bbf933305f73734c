"""Instruction tuning (supervised fine-tuning): only the tokens of the assistant's answers are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..data.read.formats import VARIABLES
from ..state import Example, Row
from .language_model import LanguageModelTask


class Instruction(LanguageModelTask):
    """The task `instruction`."""

    answers = True

    def examples_of(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize messages, or a prompt and its completion; rows with `input_ids` and `labels` are kept as is."""
        if "input_ids" in row:
            return [{"input_ids": row["input_ids"], "labels": row["labels"]}]
        if "messages" not in row:
            return [tokenizer.encode_pair(row["prompt"], row["completion"])]
        given = [row["messages"], row.get("tools"), row.get("context", 0)]
        if row.get(VARIABLES):
            given.append(row[VARIABLES])
        if getattr(self.config, "one_row_per_turn", False):
            examples: Sequence[Example] = tokenizer.encode_turns(*given)
            return examples
        return [tokenizer.encode_messages(*given)]
