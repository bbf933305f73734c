"""Token ids of a text with the characters that each token stands for, in memory of a fraction of what tokenizers needs.

tokenizers takes some 150 bytes per character of the text that it encodes. A long text is therefore encoded in windows
that overlap, and joined in the middle of each overlap, where both windows have to have the same tokens for a stretch
that is far from their edges. For byte pair encoding, the result is that of the whole text: a token sequence is the
encoding of its text if each two neighbors are the encoding of theirs, as all of them are here. So it is for models that
encode each word on its own. For a Unigram model without word boundaries, the long agreement is a check and no proof. A
text whose windows differ, such as one with a word longer than an overlap, is encoded at once.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

WINDOW = 1 << 18  # characters
OVERLAPS = (1 << 14, 1 << 17)  # characters; the second one if windows differ with the first
_EQUAL = 1 << 11  # characters around the middle of an overlap in which both windows have the same tokens
_LEAST = 32  # tokens in these characters


@dataclass(frozen=True)
class PlacedTokens:
    """The tokens of a text.

    Attributes:
        ids: Their ids.
        starts: First character of each.
        stops: The character behind the last one of each.
    """

    ids: list[int]
    starts: Sequence[int] | np.ndarray
    stops: Sequence[int] | np.ndarray


def tokenize(tokenizer: Any, text: str) -> PlacedTokens:
    """Return the tokens of a text without those that a tokenizer adds around it.

    Args:
        tokenizer: A fast transformers tokenizer.
        text: The text.
    """
    if len(text) > WINDOW:
        for overlap in OVERLAPS:
            if (joined := _joined(tokenizer, text, overlap)) is not None:
                return joined
    ids, offsets = _encode(tokenizer, text)
    starts, stops = zip(*offsets, strict=True) if ids else ((), ())
    return PlacedTokens(ids, starts, stops)


def _encode(tokenizer: Any, text: str) -> tuple[list[int], list[tuple[int, int]]]:
    backend = tokenizer.backend_tokenizer
    kind: Any = type(tokenizer)
    if (
        _calls_backend(kind)
        and backend.truncation is None
        and backend.padding is None
        and backend.encode_special_tokens == tokenizer.split_special_tokens
    ):  # what transformers does in the other branch, in four fifths of its time
        encoding = backend.encode(text, add_special_tokens=False)
        return encoding.ids, encoding.offsets
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    return encoded["input_ids"], encoded["offset_mapping"]


@functools.cache
def _calls_backend(kind: type) -> bool:
    """Return whether a class of tokenizers encodes texts as that of transformers does."""
    from transformers import PreTrainedTokenizerFast

    names = ("__call__", "_encode_plus", "_batch_encode_plus")
    return all(getattr(kind, name, None) is getattr(PreTrainedTokenizerFast, name, None) for name in names)


def _joined(tokenizer: Any, text: str, overlap: int) -> PlacedTokens | None:
    """Return the tokens of a text that is encoded in windows, or None if they differ where they overlap."""
    ids: list[int] = []
    places: list[np.ndarray] = []
    shared: dict[int, int] = {}  # one object for each id: a list of others would take four times the memory

    def add(table: np.ndarray) -> None:
        ids.extend(map(shared.setdefault, *[table[0].tolist()] * 2))
        places.append(table[1:])

    last: np.ndarray | None = None
    for start, window in _windows(tokenizer, text, overlap):
        if last is not None:
            middle = start + overlap // 2
            left, right = (_around(table, middle) for table in (last, window))
            if left.shape[1] < _LEAST or not np.array_equal(left, right):
                return None
            add(last[:, : np.searchsorted(last[1], middle)])
            last = window[:, np.searchsorted(window[1], middle) :]
        else:
            last = window
    assert last is not None, "the text is longer than a window"
    add(last)
    starts, stops = (np.concatenate([table[row] for table in places]) for row in (0, 1))
    return PlacedTokens(ids, starts, stops)


def _windows(tokenizer: Any, text: str, overlap: int) -> Iterator[tuple[int, np.ndarray]]:
    """Yield the start of each window, and the ids, starts and stops of its tokens, `[3, num_tokens]` int32."""
    for start in range(0, len(text) - overlap, WINDOW - overlap):
        ids, offsets = _encode(tokenizer, text[start : start + WINDOW])
        table = np.empty((3, len(ids)), dtype=np.int32)
        table[0], table[1:] = ids, np.asarray(offsets, dtype=np.int32).reshape(-1, 2).T + start
        yield start, table


def _around(table: np.ndarray, middle: int) -> np.ndarray:
    """Return the tokens that start near a character."""
    first, last = np.searchsorted(table[1], (middle - _EQUAL // 2, middle + _EQUAL // 2))
    return table[:, first:last]
