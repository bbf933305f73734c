"""Rows that stand more than once: in a split, or in another and in data.train too, where scores promise too much.

What counts is what a model reads: rows of the same tokens, whatever their labels.
"""

from __future__ import annotations

import hashlib
from itertools import pairwise

import numpy as np

from ...state import ORIGIN, Layout
from .table import TokenTable

DIGESTS = "digests.npy"  # [rows kept] uint64, beside a table


def digest_rows(table: TokenTable, layout: Layout) -> np.ndarray:
    """[rows] uint64, equal where all tokens of a row are; of a billion rows two others are equal in 3 % of cases."""
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
    """How many rows repeat an earlier one."""
    return len(digests) - len(np.unique(digests))


def describe_shared(name: str, digests: np.ndarray, training: np.ndarray) -> str | None:
    """What to say of a split of which rows stand in data.train too; None where there are none."""
    count = int(np.isin(digests, training).sum())
    if not count:
        return None
    told = f"all {count:,} rows" if count == len(digests) else f"{count:,} of {len(digests):,} rows"
    return f"data.{name}: {told} stand in data.train too, so that its scores tell little of unseen ones"
