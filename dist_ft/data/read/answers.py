"""Parsing of the answer columns of question answering datasets."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .messages import RowShape

ANSWERS = ("answers", "answer")


def answers_of(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """Return the answers of a row as `{"text": [str, …], "answer_start": [int or None, …]}`.

    Supported forms are SQuAD's object of lists, a list of `{"text": …, "answer_start": …}`, a list of strings, and a
    single string. For the last two, an optional column `answer_start` gives the start offsets in characters. Blank
    answers are removed.

    Returns:
        Two lists of equal length, both empty if the question has no answer.

    Raises:
        RowShape: The answers have another form.
    """
    value: Any = next((row[name] for name in ANSWERS if name in row), None)
    starts = row.get("answer_start")
    if isinstance(value, Mapping):
        value, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value, starts = [item.get("text") for item in value], [item.get("answer_start") for item in value]
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowShape(f"the answers are {value!r:.40}, neither strings nor SQuAD's text and answer_start")
    places = starts if isinstance(starts, list) else [starts]
    if len(places) != len(texts):
        places = [None] * len(texts)
    given = [(text, _number(place)) for text, place in zip(texts, places, strict=True) if text.strip()]
    return {"text": [text for text, _ in given], "answer_start": [place for _, place in given]}


def _number(place: Any) -> int | None:
    """Return an integer start offset, parsed if it is a string (as in CSV), or None for any other value."""
    if isinstance(place, str) and place.strip().isdecimal():
        return int(place)
    return place if type(place) is int else None
