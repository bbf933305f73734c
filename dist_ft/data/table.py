"""Tokenised rows on disk: ragged integer columns in flat arrays, read by memory map, so that no rank holds a copy."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.lib import format as npy

COLUMN = "{}.npy"
OFFSETS = "offsets.npy"
_HEADER_BYTES = 128
_FLUSH_TOKENS = 1 << 20


class FlatWriter:
    """A one-dimensional .npy array that is written piece by piece; its length is not known before the end."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file: IO[bytes] = path.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)

    def append(self, values: np.ndarray) -> None:
        """Write `values` behind what is there."""
        self._file.write(np.ascontiguousarray(values, dtype=self.dtype).tobytes())
        self.length += len(values)

    def close(self) -> None:
        """Write the header, now that the length is known."""
        description = {"descr": npy.dtype_to_descr(self.dtype), "fortran_order": False, "shape": (self.length,)}
        text = str(description).encode("latin1")
        room = _HEADER_BYTES - len(npy.magic(1, 0)) - 2
        self._file.seek(0)
        self._file.write(npy.magic(1, 0) + room.to_bytes(2, "little") + text.ljust(room - 1) + b"\n")
        self._file.close()


class TableWriter:
    """Writes a table row by row; memory is bounded by about a million tokens.

    Args:
        folder: where the table's files go; it exists.
        columns: names; every row has all of them, of one length.
    """

    def __init__(self, folder: Path, columns: Sequence[str]) -> None:
        self._columns = {name: FlatWriter(folder / COLUMN.format(name), "<i4") for name in columns}
        self._offsets = FlatWriter(folder / OFFSETS, "<i8")
        self._offsets.append(np.zeros(1))
        self._pending: dict[str, list[Sequence[int]]] = {name: [] for name in columns}
        self._ends: list[int] = []
        self._waiting = 0
        self.tokens = 0
        self.rows = 0

    def append(self, example: Mapping[str, Sequence[int]]) -> None:
        """Add a row."""
        length = len(next(iter(example.values())))
        for name, values in example.items():
            assert len(values) == length, "columns of a row have one length"
            self._pending[name].append(values)
        self.tokens += length
        self.rows += 1
        self._ends.append(self.tokens)
        self._waiting += length
        if self._waiting >= _FLUSH_TOKENS:
            self._flush()

    def close(self) -> None:
        """Finish the files."""
        self._flush()
        for writer in (*self._columns.values(), self._offsets):
            writer.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _flush(self) -> None:
        for name, rows in self._pending.items():
            if rows:
                self._columns[name].append(np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]))
            rows.clear()
        self._offsets.append(np.asarray(self._ends, dtype=np.int64))
        self._ends.clear()
        self._waiting = 0


class TokenTable:
    """Tokenised rows; `table.example(i)` maps each column to the [length] int32 values of row i.

    Args:
        columns: flat [tokens] int32 arrays.
        offsets: [rows + 1] int64, where each row begins.
    """

    def __init__(self, columns: Mapping[str, np.ndarray], offsets: np.ndarray) -> None:
        self.columns = dict(columns)
        self.offsets = offsets

    @classmethod
    def open(cls, folder: str | Path) -> TokenTable:
        """The table that a `TableWriter` left in `folder`, memory-mapped."""
        folder = Path(folder)
        columns = {path.stem: load_flat(path) for path in sorted(folder.glob("*.npy")) if path.name != OFFSETS}
        return cls(columns, load_flat(folder / OFFSETS))

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Sequence[int]]]) -> TokenTable:
        """A table in memory."""
        lengths = [len(next(iter(row.values()))) for row in rows]
        columns = {name: np.concatenate([np.asarray(row[name], dtype=np.int32) for row in rows]) for name in rows[0]}
        return cls(columns, np.cumsum([0, *lengths], dtype=np.int64))

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """[rows] int64: tokens of each row."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return int(self.offsets[-1])

    def example(self, row: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """The columns of a row, or of its tokens from `start` to before `stop`."""
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        stop = last - first if stop is None else stop
        assert 0 <= start <= stop <= last - first, f"row {row} has {last - first} tokens"
        return {name: values[first + start : first + stop] for name, values in self.columns.items()}


def load_flat(path: Path) -> np.ndarray:
    """A flat array by memory map; an empty one cannot be mapped and is read."""
    header_only = path.stat().st_size <= _HEADER_BYTES
    array: np.ndarray = np.load(path, mmap_mode=None if header_only else "r", allow_pickle=False)
    return array
