"""Exact match and F1 of answers, as in the official scripts of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016 and 2018)."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence

from ...state import Prediction

_PUNCTUATION = str.maketrans("", "", string.punctuation)
_ARTICLES = re.compile(r"\b(a|an|the)\b")


def normalise(text: str) -> str:
    """Lowercase a text, remove ASCII punctuation and English articles, and separate words by single spaces."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(text: str, answer: str) -> float:
    """Return 1 if the normalized texts are equal, else 0."""
    return float(normalise(text) == normalise(answer))


def f1(text: str, answer: str) -> float:
    """Return the harmonic mean of the precision and the recall of words; without words, 1 if both texts have none."""
    guessed, given = normalise(text).split(), normalise(answer).split()
    if not guessed or not given:
        return float(guessed == given)
    return 2 * sum((Counter(guessed) & Counter(given)).values()) / (len(guessed) + len(given))


def measure(predictions: Sequence[Prediction]) -> dict[str, float]:
    """Compute `exact_match` and `f1`, from 0 to 1, as means over rows of the best score against the row's answers.

    If some rows have no answer, `exact_match_unanswerable` is the fraction of these that are predicted to have none,
    and `exact_match_answerable` and `f1_answerable` are the means over the other rows.

    Args:
        predictions: Predictions of all rows, with `prediction` (empty for no answer) and `answers`.
    """
    exact, overlap, answerable = [], [], []
    for row in predictions:
        given = [answer for answer in row["answers"] if normalise(answer)] or [""]
        exact.append(max(exact_match(row["prediction"], answer) for answer in given))
        overlap.append(max(f1(row["prediction"], answer) for answer in given))
        answerable.append(bool(row["answers"]))
    found = {"exact_match": _mean(exact), "f1": _mean(overlap)}
    if not all(answerable):
        found["exact_match_unanswerable"] = _mean([v for v, has in zip(exact, answerable, strict=True) if not has])
    if any(answerable) and not all(answerable):
        for name, values in (("exact_match", exact), ("f1", overlap)):
            found[f"{name}_answerable"] = _mean([v for v, has in zip(values, answerable, strict=True) if has])
    return found


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
