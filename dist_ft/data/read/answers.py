"""Parsing of the answer columns of question answering datasets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
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
        raise RowShape("the answers are neither strings nor SQuAD's text and answer_start", seen=f"{value!r:.40}")
    places = starts if isinstance(starts, list) else [starts]
    if len(places) != len(texts):
        places = [None] * len(texts)
    given = [(text, _number(place)) for text, place in zip(texts, places, strict=True) if text.strip()]
    return {"text": [text for text, _ in given], "answer_start": [place for _, place in given]}


def flatten_articles(rows: Iterator[tuple[str, Any]]) -> Iterator[tuple[str, Any]]:
    """Yield a row for each question of an article of SQuAD's files, and other rows unchanged.

    An article is `{"title": …, "paragraphs": [{"context": …, "qas": [{"question": …, "answers": […]}]}]}`. The place of
    a question is that of its article and its number in it.
    """
    for place, row in rows:
        paragraphs = row.get("paragraphs") if isinstance(row, dict) else None
        if not isinstance(paragraphs, list) or not all(isinstance(part, dict) and "qas" in part for part in paragraphs):
            yield place, row
            continue
        whole = {name: value for name, value in row.items() if name != "paragraphs"}
        number = 0
        for part in paragraphs:
            own = {name: value for name, value in part.items() if name != "qas"}
            for question in part["qas"]:
                number += 1
                flat = {**whole, **own, **question} if isinstance(question, dict) else question
                yield f"{place}, question {number}", flat


def _number(place: Any) -> int | None:
    """Return an integer start offset, parsed if it is a string (as in CSV), or None for any other value."""
    if isinstance(place, str) and place.strip().isdecimal():
        return int(place)
    return place if type(place) is int else None
