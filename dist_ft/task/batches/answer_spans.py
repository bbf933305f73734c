"""Answer spans for extractive question answering: located in the data and predicted from logits.

The chunks of a context (called pieces in the code) and their labels follow `run_qa.py` in the examples of transformers,
and the prediction follows `utils_qa.py` there: the score of a span is the sum of its start and end logits, the score of
no answer is that of the null position, and the prediction of a row is the best span of all its chunks. Unlike
`utils_qa.py`, all spans of a chunk are considered, not only those of the best start and end positions.
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
    """Find the first answer that occurs in `context`, without leading and trailing whitespace.

    Args:
        context: Text to search.
        answers: `text` and `answer_start` of each answer; `answer_start` is a character offset or None. If the answer
            is not at this offset, its nearest occurrence is used; without an offset, its first occurrence.

    Returns:
        Character offsets of the begin and the exclusive end of the answer, or None if no answer occurs.
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
    """Find the first and the last token (inclusive) that overlap with a span of characters.

    Args:
        begins: `[tokens]` offset of the first character of each token; -1 for tokens without characters.
        ends: `[tokens]` offset after the last character of each token.
        span: Character offsets of the begin and the exclusive end.

    Returns:
        Indices of the two tokens, or None if no token overlaps with the span.
    """
    inside = np.flatnonzero((begins >= 0) & (begins < span[1]) & (ends > span[0]))
    return (int(inside[0]), int(inside[-1])) if len(inside) else None


def cut_pieces(tokens: int, room: int, overlap: int) -> Iterator[Span]:
    """Split a context into overlapping chunks of at most `room` tokens.

    Args:
        tokens: Number of tokens of the context.
        room: Maximum number of tokens per chunk; must be greater than `overlap` unless all tokens fit into one chunk.
        overlap: Number of tokens that consecutive chunks share.

    Yields:
        Index of the first token and exclusive index of the last token of each chunk.
    """
    first = 0
    while first + room < tokens:
        yield first, first + room
        first += room - overlap
    yield first, tokens


def rank_spans(
    starts: Tensor, ends: Tensor, allowed: Tensor, longest: int, count: int
) -> list[list[tuple[int, int, float]]]:
    """Find the best spans of tokens of each row by the sum of their start and end logits.

    Args:
        starts: `[batch, seq_len]` start logits.
        ends: `[batch, seq_len]` end logits.
        allowed: `[batch, seq_len]` bool, tokens at which a span may start or end.
        longest: Maximum number of tokens per span.
        count: Maximum number of spans per row.

    Returns:
        Spans of each row as (first token, last token, score) in descending order of the score; equal scores are
        ordered by position.
    """
    from torch.nn import functional

    low = float("-inf")
    begins, stops = starts.masked_fill(~allowed, low), ends.masked_fill(~allowed, low)
    longest = min(longest, starts.shape[1])
    last = functional.pad(stops, (0, longest - 1), value=low).unfold(1, longest, 1)  # [batch, seq_len, longest]
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
    """Combine the predictions of the chunks of each row into one prediction per row.

    Args:
        pieces: Predictions of the chunks, each with `origin` (index of the row), `spans` (character offsets of begin
            and end, and score) and `null` (score of no answer).
        rows: Rows of the split.
        count: Number of best spans of a row over which the softmax for `score` is computed.
        threshold: Predict no answer if its score exceeds that of the best span by more than this; None if every
            question has an answer.
    """
    by_row: dict[int, list[Prediction]] = {}
    for piece in pieces:
        by_row.setdefault(piece["origin"], []).append(piece)
    return [_answer(origin, by_row[origin], rows[origin], count, threshold) for origin in sorted(by_row)]


def _answer(origin: int, pieces: Sequence[Prediction], row: Row, count: int, threshold: float | None) -> dict[str, Any]:
    spans = sorted((tuple(span) for piece in pieces for span in piece["spans"]), key=lambda span: (-span[2], *span[:2]))
    null = min(piece["null"] for piece in pieces)  # chunks without the answer must not outweigh the one with it
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
    if "set" in pieces[0]:  # the row is from a mixture of datasets
        found["set"] = pieces[0]["set"]
    if threshold is not None:
        found["null_score_diff"] = round(null - best, 6)
        if null - best > threshold:
            found |= {"prediction": "", "start": None, "score": round(float(shares[-1]), 6)}
    return found
