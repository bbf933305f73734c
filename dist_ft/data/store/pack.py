"""Samples and packing. Packing is planned once over the whole dataset and does not depend on the world size.

A sample is one element of a batch: a list of segments, each a slice of one row. Segments of a sample do not attend to
each other.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from .table import TokenTable, load_flat

Segment = tuple[int, int, int]  # row, start token (inclusive), stop token (exclusive)
_PREFIX = "samples-"
_TOKENS_AT_ONCE = 1 << 20  # whose labels are counted together


class Samples:
    """Samples stored as flat arrays.

    Args:
        rows: Row of each segment, `[num_segments]` int64.
        starts: Start token of each segment in its row (inclusive), `[num_segments]` int64.
        stops: Stop token of each segment in its row (exclusive), `[num_segments]` int64.
        offsets: Index of the first segment of each sample, `[num_samples + 1]` int64.
    """

    def __init__(self, rows: np.ndarray, starts: np.ndarray, stops: np.ndarray, offsets: np.ndarray) -> None:
        self.rows, self.starts, self.stops, self.offsets = rows, starts, stops, offsets

    @classmethod
    def of(cls, samples: Iterable[Sequence[Segment]]) -> Samples:
        """Build samples from lists of segments."""
        listed = [list(sample) for sample in samples]
        flat = np.asarray([segment for sample in listed for segment in sample], dtype=np.int64).reshape(-1, 3)
        offsets = np.cumsum([0, *map(len, listed)], dtype=np.int64)
        return cls(flat[:, 0], flat[:, 1], flat[:, 2], offsets)

    @classmethod
    def load(cls, folder: str | Path) -> Samples:
        """Load the samples that `save` wrote by memory map."""
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
        """Return the samples for which `kept`, `[num_samples]` bool, is True."""
        sizes = np.diff(self.offsets)
        segments = np.repeat(kept, sizes)
        offsets = np.concatenate(([0], np.cumsum(sizes[kept])))
        return Samples(self.rows[segments], self.starts[segments], self.stops[segments], offsets)

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sample, `[num_samples]` int64."""
        ends = np.concatenate(([0], np.cumsum(self.stops - self.starts)))
        return np.diff(ends[self.offsets])


_FILES = ("rows.npy", "starts.npy", "stops.npy", "offsets.npy")


def in_groups(lengths: np.ndarray, sequences: int = 1) -> Samples:
    """Return samples of `sequences` consecutive whole rows each."""
    count = len(lengths)
    assert count % sequences == 0, "the number of rows must be a multiple of the sequences per sample"
    starts, stops = np.zeros(count, dtype=np.int64), np.asarray(lengths, np.int64)
    return Samples(np.arange(count), starts, stops, np.arange(0, count + 1, sequences))


def cut_blocks(lengths: np.ndarray, max_length: int) -> Samples:
    """Concatenate the rows and cut them into blocks of `max_length` tokens; the last block may be shorter.

    Args:
        lengths: Number of tokens of each row, `[num_rows]`.
        max_length: Number of tokens per block.
    """
    ends = np.cumsum(lengths, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    borders = np.unique(np.concatenate((ends, np.arange(max_length, total, max_length), [0, total])))
    first, last = borders[:-1], borders[1:]
    rows = np.searchsorted(ends, first, side="right")  # row of each segment; empty rows have none
    row_starts = ends[rows] - np.asarray(lengths, dtype=np.int64)[rows] if len(rows) else rows
    blocks = first // max_length
    count = -(-total // max_length)
    return Samples(
        rows, first - row_starts, last - row_starts, np.searchsorted(blocks, np.arange(count + 1), side="left")
    )


def pack_in_order(lengths: np.ndarray, max_length: int) -> Samples:
    """Pack whole rows in file order, as many per sample as fit (next fit)."""
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
    """Pack whole rows by best-fit decreasing: longest first, each into the fullest sample that has room for it.

    Rows in a sample are in file order, and samples are ordered by their first row. Source: Ding et al. 2024, "Fewer
    Truncations Improve Language Modeling", arXiv:2404.10830.
    """
    sizes = np.asarray(lengths)
    packs: list[list[int]] = []
    by_room: list[list[int]] = [[] for _ in range(max_length + 1)]  # room left -> packs
    rooms = (
        0  # bitmask of the room sizes that exist, which finds the smallest sufficient one in O(1) big-int operations
    )
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
    """Return the number of next-token targets of each sample, `[num_samples]` int64.

    These are the labels other than `ignored`, except that of the first token of each segment.
    """
    return count_labels(table, samples, ignored, first=1)


def count_labels(table: TokenTable, samples: Samples, ignored: int, first: int = 0) -> np.ndarray:
    """Return the number of labels other than `ignored` of each sample, `[num_samples]` int64.

    Labels before token index `first` of each segment are not counted.
    """
    labels = table.columns["labels"]
    origins = table.offsets[samples.rows]
    begins = origins + np.minimum(samples.starts + first, samples.stops)
    ends = origins + samples.stops
    counts = np.zeros(len(begins), dtype=np.int64)
    order = np.argsort(begins, kind="stable")  # neighbors are read together
    ordered, at = begins[order], 0
    while at < len(order):
        low = int(ordered[at])
        until = max(at + 1, int(np.searchsorted(ordered, low + _TOKENS_AT_ONCE)))
        part = order[at:until]
        found = np.cumsum(np.concatenate(([0], labels[low : int(ends[part].max())] != ignored)))
        counts[part] = found[ends[part] - low] - found[begins[part] - low]
        at = until
    return np.diff(np.cumsum(np.concatenate(([0], counts)))[samples.offsets])


def _whole_rows(packs: Sequence[Sequence[int]], lengths: np.ndarray) -> Samples:
    rows = np.asarray([row for pack in packs for row in pack], dtype=np.int64)
    stops = np.asarray(lengths, dtype=np.int64)[rows]
    return Samples(rows, np.zeros_like(rows), stops, np.cumsum([0, *map(len, packs)], dtype=np.int64))
