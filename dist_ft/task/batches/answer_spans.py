"""Spans of a text that answer a question: found in the data, and chosen from a model's scores.

Pieces and their labels are those of the example `run_qa.py` of transformers, and so is the choice in `utils_qa.py`: a
span scores the sum of its start's and end's logits, nothing scores that of the null place, and a row takes the best of
all its pieces. Of a piece every span is considered here, not only those of the best starts and ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ...state import Prediction, Row

if TYPE_CHECKING:
    from torch import Tensor


Span = tuple[int, int]


def find_answer(context: str, answers: Mapping[str, list[Any]]) -> tuple[int, int] | None:
    """Where in `context` the first answer that stands there begins and ends, without blanks at its ends.

    A wrong start is taken for a hint: of several places the nearest to it counts, and without one the first.
    """
    for text, start in zip(answers["text"], answers["answer_start"], strict=True):
        bare = text.strip()
        hint = None if start is None else start + len(text) - len(text.lstrip())
        if (begin := _find_nearest(context, bare, hint)) is not None:
            return begin, begin + len(bare)
    return None


def _find_nearest(context: str, text: str, hint: int | None) -> int | None:
    if hint is None or hint < 0:
        begin = context.find(text)
        return None if begin < 0 else begin
    if context.startswith(text, hint):
        return hint
    behind, before = context.find(text, hint), context.rfind(text, 0, hint + len(text))
    found = [begin for begin in (before, behind) if begin >= 0]
    return min(found, key=lambda begin: abs(begin - hint), default=None)


def find_tokens(begins: np.ndarray, ends: np.ndarray, span: Span) -> Span | None:
    """The first and the last token that have a character of `span`; None where no token has one.

    Args:
        begins: [tokens] first character of each token, -1 where it has none.
        ends: [tokens] behind the last character.
        span: characters.
    """
    inside = np.flatnonzero((begins >= 0) & (begins < span[1]) & (ends > span[0]))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def cut_pieces(tokens: int, room: int, overlap: int) -> Iterator[Span]:
    """First token and behind the last one of pieces of at most `room` tokens that together have all of them.

    Args:
        tokens: of the context.
        room: of a piece; more than `overlap` unless all tokens fit.
        overlap: tokens that a piece shares with the one before.
    """
    first = 0
    while first + room < tokens:
        yield first, first + room
        first += room - overlap
    yield first, tokens


def rank_spans(
    starts: Tensor, ends: Tensor, allowed: Tensor, longest: int, count: int
) -> list[list[tuple[int, int, float]]]:
    """Of each row its best spans of tokens: first, last and score, the best first; equal ones in their order.

    Args:
        starts: [B, T] logits.
        ends: [B, T] logits.
        allowed: [B, T] bool, tokens at which a span may begin and end.
        longest: most tokens of a span.
        count: most spans of a row.
    """
    from torch.nn import functional

    low = float("-inf")
    begins, stops = starts.masked_fill(~allowed, low), ends.masked_fill(~allowed, low)
    longest = min(longest, starts.shape[1])
    last = functional.pad(stops, (0, longest - 1), value=low).unfold(1, longest, 1)  # [B, T, longest]
    scores = (begins.unsqueeze(-1) + last).flatten(1)
    values, places = scores.sort(dim=1, descending=True, stable=True)
    return [
        [
            (at // longest, at // longest + at % longest, value)
            for value, at in zip(row, chosen, strict=True)
            if value > low
        ]
        for row, chosen in zip(values[:, :count].tolist(), places[:, :count].tolist(), strict=True)
    ]


def answer_rows(
    pieces: Sequence[Prediction], rows: Sequence[Row], count: int, threshold: float | None
) -> list[dict[str, Any]]:
    """One prediction a row from those of its pieces.

    Args:
        pieces: each has `origin`, `spans` (begin and end in characters, score) and `null` (score of no answer).
        rows: as they were.
        count: best spans of a row that share the probability of 1.
        threshold: by how much nothing must score higher to be the answer; None if it never is.
    """
    by_row: dict[int, list[Prediction]] = {}
    for piece in pieces:
        by_row.setdefault(piece["origin"], []).append(piece)
    return [_answer(origin, by_row[origin], rows[origin], count, threshold) for origin in sorted(by_row)]


def _answer(origin: int, pieces: Sequence[Prediction], row: Row, count: int, threshold: float | None) -> dict[str, Any]:
    spans = sorted((tuple(span) for piece in pieces for span in piece["spans"]), key=lambda span: (-span[2], *span[:2]))
    null = min(piece["null"] for piece in pieces)  # a piece without the answer says nothing against another one
    scores = np.array([score for *_, score in spans[:count]] + [null] * (threshold is not None))
    shares = np.exp(scores - scores.max())
    shares /= shares.sum()
    begin, end, best = spans[0]
    found: dict[str, Any] = {
        "sample": origin,
        "prediction": row["context"][begin:end],
        "start": begin,
        "score": round(float(shares[0]), 6),
        "answers": row["answers"]["text"],
    }
    if "id" in row:
        found["id"] = row["id"]
    if "set" in pieces[0]:  # of a mixture
        found["set"] = pieces[0]["set"]
    if threshold is not None:
        found["null_score_diff"] = round(null - best, 6)
        if null - best > threshold:
            found |= {"prediction": "", "start": None, "score": round(float(shares[-1]), 6)}
    return found
