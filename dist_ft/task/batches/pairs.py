"""Pairs of answers as tokens: what the tasks that learn from preferences share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ...data.read.faults import RowFault
from ...state import Example, Row

EQUAL = "chosen and rejected are the same"


def encode_pair(row: Row, tokenizer: Any) -> list[Example]:
    """`input_ids` and `labels` of the prompt with each of its answers, the chosen one first.

    Labels are those of the task `instruction`: the answer with the token that ends it (data/template.py).

    Raises:
        RowFault: an answer is empty, both are the same, or the template cannot show them.
    """
    prompt, answers = row["prompt"], [row["chosen"], row["rejected"]]
    if answers[0] == answers[1]:
        raise RowFault(EQUAL, "leave such pairs out")
    if isinstance(prompt, str):
        return [tokenizer.encode_pair(prompt, answer) for answer in answers]
    if not prompt:
        raise RowFault("chosen and rejected begin with no common message", "give the prompt in a column of its own")
    tools = row.get("tools")
    return [tokenizer.encode_messages([*prompt, *answer], tools, len(prompt)) for answer in answers]


def cut_pair(pair: Sequence[Example], max_length: int) -> list[Example]:
    """The first `max_length` tokens of each.

    Raises:
        RowFault: nothing is left in which they differ.
    """
    cut: list[Example] = [{name: values[:max_length] for name, values in one.items()} for one in pair]
    if cut[0] == cut[1]:
        raise RowFault("all in which the answers differ stands behind task.max_length", "raise task.max_length")
    return cut
