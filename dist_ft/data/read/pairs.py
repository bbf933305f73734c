"""Pairs of answers to one prompt in the shapes that preference data have, as TRL reads them.

| prompt | chosen, rejected | becomes |
| --- | --- | --- |
| text | text | text |
| messages, or a user's text | messages, or text | messages |
| not given | whole conversations | messages: the prompt is what both begin with |
| not given | whole texts | text: the prompt is what both begin with, up to white space |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import RowShape, check_messages

Message = dict[str, Any]


def pair_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """`prompt`, `chosen` and `rejected`, all of them text or all of them lists of messages.

    Raises:
        RowShape: a value is neither.
    """
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list):
        raise RowShape(f"prompt is {prompt!r:.40}, neither text nor a list of messages")
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if prompt is None:
            prompt = _shared_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowShape("chosen and rejected must both be text or both lists of messages")
    one, other = _messages(chosen), _messages(rejected)
    shared = _shared_messages(one, other)
    if isinstance(prompt, list):
        given = check_messages(prompt) if prompt else []
        shared = len(given) if given and given == one[:shared][: len(given)] else 0
    elif isinstance(prompt, str) and not shared:
        given = [{"role": "user", "content": prompt}]
    else:  # a text beside whole conversations repeats what stands in them
        given = one[:shared]
    return {"prompt": given, "chosen": one[shared:], "rejected": other[shared:]}


def _answer(row: Mapping[str, Any], name: str) -> str | list[Any]:
    value = row[name]
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, str | list):
        raise RowShape(f"{name} is {value!r:.40}, neither text nor a list of messages")
    return value


def _messages(answer: str | list[Any]) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return check_messages(answer) if answer else []


def _shared_messages(one: Sequence[Message], other: Sequence[Message]) -> int:
    """With how many messages both begin; the last of either is an answer, even where they are equal."""
    most = max(0, min(len(one), len(other)) - 1)
    return next((i for i in range(most) if one[i] != other[i]), most)


def _shared_text(one: str, other: str) -> str:
    """With what both begin, up to the white space before the first word that differs."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    spaces = [i for i in range(same) if one[i].isspace()]
    return one[: spaces[-1]] if spaces else ""
