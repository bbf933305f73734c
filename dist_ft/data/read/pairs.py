"""Preference pairs, in the forms that TRL supports.

| prompt | chosen, rejected | result |
| --- | --- | --- |
| string | string | string |
| messages, or the user's text as a string | messages, or string | messages |
| not given | whole conversations | messages; the prompt is their common prefix |
| not given | whole texts | string; the prompt is their common prefix, up to the last whitespace |
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .messages import RowShape, check_messages

Message = dict[str, Any]


def pair_of(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return `prompt`, `chosen` and `rejected` of a row, either all strings or all lists of messages.

    Raises:
        RowShape: A value is neither a string nor a list of messages, or the answers differ in type.
    """
    prompt = row.get("prompt")
    if prompt is not None and not isinstance(prompt, str | list):
        raise RowShape("prompt is neither a string nor a list of messages", seen=f"{prompt!r:.40}")
    chosen, rejected = (_answer(row, name) for name in ("chosen", "rejected"))
    if isinstance(chosen, str) and isinstance(rejected, str) and not isinstance(prompt, list):
        if prompt is None:
            prompt = _shared_text(chosen, rejected)
            chosen, rejected = chosen[len(prompt) :], rejected[len(prompt) :]
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    if isinstance(chosen, str) != isinstance(rejected, str):
        raise RowShape("chosen and rejected must both be strings or both be lists of messages")
    one, other = _messages(chosen), _messages(rejected)
    shared = _shared_messages(one, other)
    if isinstance(prompt, list):
        given = check_messages(prompt) if prompt else []
        shared = len(given) if given and given == one[:shared][: len(given)] else 0
    elif isinstance(prompt, str) and not shared:
        given = [{"role": "user", "content": prompt}]
    else:  # whole conversations already contain a prompt given as a string
        given = one[:shared]
    return {"prompt": given, "chosen": one[shared:], "rejected": other[shared:]}


def _answer(row: Mapping[str, Any], name: str) -> str | list[Any]:
    value = row[name]
    value = [value] if isinstance(value, Mapping) else value
    if not isinstance(value, str | list):
        raise RowShape(f"{name} is neither a string nor a list of messages", seen=f"{value!r:.40}")
    return value


def _messages(answer: str | list[Any]) -> list[Message]:
    if isinstance(answer, str):
        return [{"role": "assistant", "content": answer}]
    return check_messages(answer) if answer else []


def _shared_messages(one: Sequence[Message], other: Sequence[Message]) -> int:
    """Return the number of messages in the common prefix, which never includes the last message of either."""
    most = max(0, min(len(one), len(other)) - 1)
    return next((i for i in range(most) if one[i] != other[i]), most)


def _shared_text(one: str, other: str) -> str:
    """Return the common prefix, up to the whitespace before the first word that differs."""
    same = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    spaces = [i for i in range(same) if one[i].isspace()]
    return one[: spaces[-1]] if spaces else ""


def refuse_rejected(row: Mapping[str, Any]) -> None:
    """Refuse a row whose answer is marked as a bad one, as in unpaired preference data (KTO).

    Raises:
        RowShape: The column `label` or `kto_tag` is false.
    """
    for name in ("label", "kto_tag"):
        if row.get(name) is False or row.get(name) in ("false", "False"):
            way_out = "remove these rows, or use pairs with task=preference; to train on them, remove the column"
            raise RowShape(
                f"{name} is false, which marks the answer as one not to learn (unpaired preference)", way_out
            )
