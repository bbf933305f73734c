"""Answers to questions about a text, from the forms in which data sets have them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .messages import RowShape

ANSWERS = ("answers", "answer")


def answers_of(row: Mapping[str, Any]) -> dict[str, list[Any]]:
    """`{"text": [str, …], "answer_start": [int or None, …]}` of equal lengths; both empty where there is no answer.

    Understood are SQuAD's columns (an object of lists), a list of `{"text": …, "answer_start": …}`, a list of texts,
    and one text; of the last two a column `answer_start` may tell where they begin. Blank answers are none.

    Raises:
        RowShape: it is something else.
    """
    value: Any = next((row[name] for name in ANSWERS if name in row), None)
    starts = row.get("answer_start")
    if isinstance(value, Mapping):
        value, starts = value.get("text"), value.get("answer_start")
    elif isinstance(value, list) and value and all(isinstance(item, Mapping) for item in value):
        value, starts = [item.get("text") for item in value], [item.get("answer_start") for item in value]
    texts = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
        raise RowShape(f"the answers are {value!r:.40}, neither texts nor SQuAD's text and answer_start")
    places = starts if isinstance(starts, list) else [starts]
    if len(places) != len(texts):
        places = [None] * len(texts)
    given = [(text, _number(place)) for text, place in zip(texts, places, strict=True) if text.strip()]
    return {"text": [text for text, _ in given], "answer_start": [place for _, place in given]}


def _number(place: Any) -> int | None:
    """A start that is a whole number, or the text of one as CSV has it."""
    if isinstance(place, str) and place.strip().isdecimal():
        return int(place)
    return place if type(place) is int else None
