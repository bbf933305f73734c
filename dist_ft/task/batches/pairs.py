"""Tokenization of preference pairs, shared by the tasks `preference` and `reward`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.read.faults import RowFault
from ...data.read.formats import VARIABLES
from ...state import Example, Row

EQUAL = "chosen and rejected are the same"


def encode_pair(row: Row, tokenizer: Any) -> list[Example]:
    """Tokenize the prompt with the chosen answer, and the prompt with the rejected answer.

    As in the task `instruction`, the labels cover the answer including the token that ends it; see
    `data/render/template.py`.

    Returns:
        `input_ids` and `labels` of the chosen and of the rejected sequence.

    Raises:
        RowFault: If an answer is empty, both answers are the same, or the chat template cannot render them.
    """
    prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
    if answers[0] == answers[1]:
        raise RowFault(EQUAL, "remove such pairs")
    if isinstance(prompt, str):
        return [tokenizer.encode_pair(prompt, answer) for answer in answers]
    if not prompt:
        raise RowFault("chosen and rejected do not start with a common message", "provide the prompt in its own column")
    given = (row.get("tools"), len(prompt), row.get(VARIABLES))
    return [tokenizer.encode_messages([*prompt, *answer], *given) for answer in answers]


def cut_pair(pair: Sequence[Example], max_length: int) -> list[Example]:
    """Truncate both sequences of a pair to their first `max_length` tokens.

    Raises:
        RowFault: If the truncated sequences are identical.
    """
    cut: list[Example] = [{name: values[:max_length] for name, values in one.items()} for one in pair]
    if cut[0] == cut[1]:
        raise RowFault("the answers do not differ within the first task.max_length tokens", "raise task.max_length")
    return cut
