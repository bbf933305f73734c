"""Detection of repeated rows in a split, and of evaluation rows that are also in data.train and inflate scores.

Rows are equal if they have the same tokens, regardless of their labels.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from ...state import ORIGIN, Layout
from .table import TokenTable

DIGESTS = "digests.npy"  # [rows_kept] uint64, in the folder of the table


def digest_rows(table: TokenTable, layout: Layout) -> np.ndarray:
    """Return a digest of the tokens of each row, `[num_rows]` uint64.

    Rows with the same tokens have the same digest. With a billion distinct rows, the probability that any two collide
    is 3 %.
    """
    sequences = len(table)
    if ORIGIN in layout.row_columns:
        starts = np.flatnonzero(np.diff(table.row_columns[ORIGIN][0], prepend=-1))
    else:
        starts = np.arange(0, sequences, layout.sequences)
    ids, offsets = table.columns["input_ids"], table.offsets
    found = np.empty(len(starts), dtype=np.uint64)
    for row, (first, end) in enumerate(pairwise([*starts.tolist(), sequences])):
        digest = hashlib.blake2b(np.diff(offsets[first : end + 1]).tobytes(), digest_size=8)
        digest.update(ids[offsets[first] : offsets[end]].tobytes())
        found[row] = int.from_bytes(digest.digest(), "little")
    return found


def count_repeats(digests: np.ndarray) -> int:
    """Return the number of rows that repeat an earlier row."""
    return len(digests) - len(np.unique(digests))


def describe_shared(name: str, digests: np.ndarray, training: np.ndarray) -> str | None:
    """Return a warning about a split with rows that are also in data.train, or None if there are no such rows."""
    count = int(np.isin(digests, training).sum())
    if not count:
        return None
    told = f"all {count:,} rows" if count == len(digests) else f"{count:,} of {len(digests):,} rows"
    return f"data.{name}: {told} are also in data.train, so its scores say little about unseen rows"
