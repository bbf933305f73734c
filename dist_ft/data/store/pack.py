"""Samples: what one place in a batch holds. Packing is planned over the whole set, once, and depends on no world size.

A sample is a list of segments, each a piece of one row; segments of a sample never see each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .table import TokenTable, load_flat

Segment = tuple[int, int, int]  # row, first token, behind the last token
_PREFIX = "samples-"


class Samples:
    """Samples as flat arrays.

    Args:
        rows: [segments] int64, the row of each segment.
        starts: [segments] int64, first token in the row.
        stops: [segments] int64, behind the last token.
        offsets: [samples + 1] int64, where each sample's segments begin.
    """

    def __init__(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray) -> None:
        self.rows, self.starts, self.stops, self.offsets = rows, starts, stops, offsets

    @classmethod
    def of(cls, samples: Iterable[Sequence[Segment]]) -> Samples:
        """From lists of segments."""
        listed = [list(sample) for sample in samples]
        flat = np.asarray([segment for sample in listed for segment in sample], dtype=np.int64).reshape(-1, 3)
        offsets = np.cumsum([0, *map(len, listed)], dtype=np.int64)
        return cls(flat[:, 0], flat[:, 1], flat[:, 2], offsets)

    @classmethod
    def load(cls, folder: str | Path) -> Samples:
        """What `save` wrote, memory-mapped."""
        return cls(*(load_flat(Path(folder) / f"{_PREFIX}{name}") for name in _FILES))

    def save(self, folder: str | Path) -> None:
        """Write the arrays into `folder`."""
        for name, array in zip(_FILES, (self.rows, self.starts, self.stops, self.offsets), strict=True):
            np.save(Path(folder) / f"{_PREFIX}{name}", array.astype(np.int64), allow_pickle=False)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, sample: int) -> list[Segment]:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        span = slice(int(self.offsets[sample]), int(self.offsets[sample + 1]))
        columns = (self.rows[span], self.starts[span], self.stops[span])
        return list(zip(*(column.tolist() for column in columns), strict=True))

    def select(self, kept: np.ndarray) -> Samples:
        """Those samples for which `kept` ([samples] bool) is true."""
        sizes = np.diff(self.offsets)
        segments = np.repeat(kept, sizes)
        offsets = np.concatenate(([0], np.cumsum(sizes[kept])))
        return Samples(self.rows[segments], self.starts[segments], self.stops[segments], offsets)

    @property
    def lengths(self) -> np.ndarray:
        """[samples] int64: tokens of each sample."""
        ends = np.concatenate(([0], np.cumsum(self.stops - self.starts)))
        return np.diff(ends[self.offsets])


_FILES = ("rows.npy", "starts.npy", "stops.npy", "offsets.npy")


def in_groups(lengths: np.ndarray, sequences: int = 1) -> Samples:
    """A sample for every so many rows of the table that follow one another."""
    count = len(lengths)
    assert count % sequences == 0, "every sample has all its sequences"
    starts, stops = np.zeros(count, dtype=np.int64), np.asarray(lengths, np.int64)
    return Samples(np.arange(count), starts, stops, np.arange(0, count + 1, sequences))


def cut_blocks(lengths: np.ndarray, max_length: int) -> Samples:
    """Rows, one after another, cut into blocks of `max_length` tokens; the last block may be shorter.

    Args:
        lengths: [rows] tokens of each row.
        max_length: tokens of a block.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.unique(np.concatenate((ends, np.arange(max_length, total, max_length), [0, total])))
    first, last = borders[:-1], borders[1:]
    rows = np.searchsorted(ends, first, side="right")  # the row in which each piece begins; empty rows have no piece
    row_starts = ends[rows] - np.asarray(lengths, dtype=np.int64)[rows] if len(rows) else rows
    blocks = first // max_length
    count = -(-total // max_length)
    return Samples(
        rows, first - row_starts, last - row_starts, np.searchsorted(blocks, np.arange(count + 1), side="left")
    )


def pack_in_order(lengths: np.ndarray, max_length: int) -> Samples:
    """Whole rows in file order, as many in a sample as fit (next fit)."""
    packs: list[list[int]] = []
    room = 0
    for row, length in enumerate(np.asarray(lengths).tolist()):
        if length > room or not packs:
            packs.append([])
            room = max_length
        packs[-1].append(row)
        room -= length
    return _whole_rows(packs, lengths)


def pack_best_fit(lengths: np.ndarray, max_length: int) -> Samples:
    """Whole rows, longest first, each into the fullest sample with room for it (best-fit decreasing).

    Rows of a sample, and samples by their first row, stand in file order. Source: Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", arXiv:2404.10830.
    """
    sizes = np.asarray(lengths)
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left → packs
    rooms = 0  # bit r is set where a pack with room r is: the next larger one is found in a few operations
    for row in np.argsort(-sizes, kind="stable").tolist():
        length = int(sizes[row])
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1
            pack = by_room[room].pop()
            if not by_room[room]:
                rooms &= ~(1 << room)
        else:
            room, pack = max_length, len(packs)
            packs.append([])
        packs[pack].append(row)
        by_room[room - length].append(pack)
        rooms |= 1 << (room - length)
    return _whole_rows(sorted(sorted(pack) for pack in packs), lengths)


def count_shifted(table: TokenTable, samples: Samples, ignored: int) -> np.ndarray:
    """[samples] int64: labels of next-token prediction other than `ignored`; a segment's first token is no target."""
    return count_labels(table, samples, ignored, first=1)


def count_labels(table: TokenTable, samples: Samples, ignored: int, first: int = 0) -> np.ndarray:
    """[samples] int64: labels other than `ignored`, from the `first` token of each segment."""
    labels = table.columns["labels"]
    origins = table.offsets[samples.rows]
    spans = zip((origins + samples.starts + first).tolist(), (origins + samples.stops).tolist(), strict=True)
    counts = [int(np.count_nonzero(labels[begin:end] != ignored)) for begin, end in spans]
    ends = np.cumsum([0, *counts], dtype=np.int64)
    return np.diff(ends[samples.offsets])


def _whole_rows(packs: Sequence[Sequence[int]], lengths: np.ndarray) -> Samples:
    rows = np.asarray([row for pack in packs for row in pack], dtype=np.int64)
    stops = np.asarray(lengths, dtype=np.int64)[rows]
    return Samples(rows, np.zeros_like(rows), stops, np.cumsum([0, *map(len, packs)], dtype=np.int64))
