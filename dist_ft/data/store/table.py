"""Tokenized rows on disk: ragged integer columns in flat arrays, memory-mapped so that ranks share one copy."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO

import numpy as np
from numpy.lib import format as npy

from ...state import ORIGIN

COLUMN, OFFSETS = "tokens-{}.npy", "offsets.npy"
ROW_COLUMN, ROW_OFFSETS = "row-{}.npy", "row-{}.offsets.npy"  # columns whose length differs from the tokens
_HEADER_BYTES = 128


class FlatWriter:
    """Writer of a one-dimensional .npy array in chunks, without knowing its final length in advance."""

    def __init__(self, path: Path, dtype: str) -> None:
        self.dtype = np.dtype(dtype)
        self.length = 0
        self._file: IO[bytes] = path.open("wb")
        self._file.write(b"\0" * _HEADER_BYTES)

    def append(self, values: np.ndarray) -> None:
        """Append `values` to the array."""
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
    """Writer of a token table, some rows at a time.

    Args:
        folder: Existing folder for the files of the table.
        columns: Names of the columns with one value per token.
        row_columns: Names of further columns, which can have any length in each row.
    """

    def __init__(self, folder: Path, columns: Sequence[str], row_columns: Sequence[str] = ()) -> None:
        self._columns = {name: FlatWriter(folder / COLUMN.format(name), "<i4") for name in columns}
        self._offsets = _OffsetWriter(folder / OFFSETS)
        self._row_columns = {
            name: (
                FlatWriter(folder / ROW_COLUMN.format(name), "<i4"),
                _OffsetWriter(folder / ROW_OFFSETS.format(name)),
            )
            for name in row_columns
        }

    @property
    def tokens(self) -> int:
        """Number of tokens written."""
        return self._offsets.end

    def extend(self, rows: TokenTable, first_origin: int = 0) -> None:
        """Append rows; `first_origin` is added to their column `origin`."""
        for name, writer in self._columns.items():
            writer.append(rows.columns[name])
        self._offsets.extend(rows.offsets)
        for name, (writer, offsets) in self._row_columns.items():
            values, ends = rows.row_columns[name]
            writer.append(values + first_origin if name == ORIGIN else values)
            offsets.extend(ends)

    def close(self) -> None:
        """Close the files."""
        for writer in (*self._columns.values(), self._offsets, *itertools.chain(*self._row_columns.values())):
            writer.close()

    def __enter__(self) -> TableWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class _OffsetWriter(FlatWriter):
    """Writer of the offsets of consecutive tables as those of one table."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, "<i8")
        self.end = 0
        self.append(np.zeros(1))

    def extend(self, offsets: np.ndarray) -> None:
        """Append the offsets of further rows, which start at 0."""
        self.append(offsets[1:] + self.end)
        self.end += int(offsets[-1])


class TokenTable:
    """Tokenized rows; `table.example(i)` maps each column to the values of row i, `[length]` int32.

    Args:
        columns: Flat columns with one value per token, each `[num_tokens]` int32.
        offsets: Start of each row in the columns, `[num_rows + 1]` int64.
        row_columns: Flat columns with any number of values per row, each with its own offsets, `[num_rows + 1]` int64.
    """

    def __init__(
        self,
        columns: Mapping[str, np.ndarray],
        offsets: np.ndarray,
        row_columns: Mapping[str, tuple[np.ndarray, np.ndarray]] | None = None,
    ) -> None:
        self.columns = dict(columns)
        self.offsets = offsets
        self.row_columns = dict(row_columns or {})

    @classmethod
    def open(cls, folder: str | Path) -> TokenTable:
        """Open the table that a `TableWriter` wrote into `folder` by memory map."""
        folder = Path(folder)
        columns = {_name(path, COLUMN): load_flat(path) for path in sorted(folder.glob(COLUMN.format("*")))}
        ragged = [_name(path, ROW_OFFSETS) for path in sorted(folder.glob(ROW_OFFSETS.format("*")))]
        row_columns = {
            name: (load_flat(folder / ROW_COLUMN.format(name)), load_flat(folder / ROW_OFFSETS.format(name)))
            for name in ragged
        }
        return cls(columns, load_flat(folder / OFFSETS), row_columns)

    @classmethod
    def of(cls, rows: Sequence[Mapping[str, Sequence[int]]]) -> TokenTable:
        """Build a table in memory from rows whose columns have one value per token."""
        lengths = [len(next(iter(row.values()))) for row in rows]
        columns = {name: np.concatenate([np.asarray(row[name], dtype=np.int32) for row in rows]) for name in rows[0]}
        return cls(columns, np.cumsum([0, *lengths], dtype=np.int64))

    def with_row_values(self, name: str, values: np.ndarray) -> TokenTable:
        """Return a table with a further row column that has one value of any dtype per row, `[num_rows]`."""
        assert len(values) == len(self)
        added = {name: (values, np.arange(len(self) + 1, dtype=np.int64))}
        return TokenTable(self.columns, self.offsets, {**self.row_columns, **added})

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each row, `[num_rows]` int64."""
        return np.diff(self.offsets)

    @property
    def tokens(self) -> int:
        """Total number of tokens."""
        return int(self.offsets[-1])

    def example(self, row: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Return the columns of a row, or of its tokens `start` (inclusive) to `stop` (exclusive).

        Row columns are always returned whole.
        """
        first, last = int(self.offsets[row]), int(self.offsets[row + 1])
        stop = last - first if stop is None else stop
        assert 0 <= start <= stop <= last - first, f"row {row} has {last - first} tokens"
        found = {name: values[first + start : first + stop] for name, values in self.columns.items()}
        for name, (values, offsets) in self.row_columns.items():
            found[name] = values[int(offsets[row]) : int(offsets[row + 1])]
        return found


def _name(path: Path, pattern: str) -> str:
    before, after = pattern.split("{}")
    return path.name[len(before) : -len(after)]


def load_flat(path: Path) -> np.ndarray:
    """Open a flat array by memory map, or read it if it is empty, because empty files cannot be mapped."""
    header_only = path.stat().st_size <= _HEADER_BYTES
    array: np.ndarray = np.load(path, mmap_mode=None if header_only else "r", allow_pickle=False)
    return array
