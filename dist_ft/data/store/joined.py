"""Concatenated views of the prepared datasets of a mixture, without copying data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from ...state import ORIGIN
from ..read.faults import SHOWN_PLACES
from .pack import Samples, Segment
from .table import TokenTable


class JoinedTable(TokenTable):
    """Concatenation of token tables.

    Args:
        tables: Tables of the datasets.
        kept: Number of rows kept from each dataset, by which the column `origin` is offset.
    """

    def __init__(self, tables: Sequence[TokenTable], kept: Sequence[int]) -> None:
        self.tables = list(tables)
        self._origins = np.cumsum([0, *kept]).tolist()
        self._starts = np.cumsum([0, *map(len, tables)])
        ends = np.cumsum([0, *(table.tokens for table in tables)])
        offsets = [table.offsets[:-1] + end for table, end in zip(tables, ends[:-1], strict=True)]
        super().__init__({}, np.concatenate([*offsets, ends[-1:]]))

    def example(self, row: int, start: int = 0, stop: int | None = None) -> dict[str, np.ndarray]:
        """Return the columns of a row, or of its tokens `start` (inclusive) to `stop` (exclusive)."""
        number = int(np.searchsorted(self._starts, row, side="right")) - 1
        found = self.tables[number].example(row - int(self._starts[number]), start, stop)
        if ORIGIN in found:
            found[ORIGIN] = found[ORIGIN] + self._origins[number]
        return found


class JoinedSamples(Samples):
    """Concatenation of samples.

    Args:
        parts: Samples of the datasets.
        rows: Number of rows in each dataset's table.
    """

    def __init__(self, parts: Sequence[Samples], rows: Sequence[int]) -> None:
        self.parts = list(parts)
        self.starts_of_parts = np.cumsum([0, *map(len, parts)])
        self._rows = np.cumsum([0, *rows]).tolist()

    def __len__(self) -> int:
        return int(self.starts_of_parts[-1])

    def __getitem__(self, sample: int) -> list[Segment]:
        if not 0 <= sample < len(self):
            raise IndexError(sample)
        number = int(np.searchsorted(self.starts_of_parts, sample, side="right")) - 1
        segments = self.parts[number][sample - int(self.starts_of_parts[number])]
        return [(row + self._rows[number], start, stop) for row, start, stop in segments]

    @property
    def lengths(self) -> np.ndarray:
        """Number of tokens of each sample, `[num_samples]` int64."""
        return np.concatenate([part.lengths for part in self.parts])


def join_ledgers(ledgers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Merge the ledgers of all datasets: sum counts and causes, and take the maximum of lengths and token ids."""
    every = list(ledgers.values())
    found = dict(every[0])
    for key in ("rows_read", "rows_kept", "repeated", "tokens", "samples", "tokens_in_samples", "tokens_left_over"):
        found[key] = sum(ledger[key] for ledger in every)
    found["files"] = {name: rows for ledger in every for name, rows in ledger.get("files", {}).items()}
    for key in ("augmented", "unchanged"):
        found[key] = sum(ledger.get(key, 0) for ledger in every)
    found["supervised_tokens"] = sum(ledger["supervised_tokens"] for ledger in every)
    found["max_token_id"] = max(ledger["max_token_id"] for ledger in every)
    longest = max(every, key=lambda ledger: ledger["longest"])
    found["longest"], found["longest_place"] = longest["longest"], longest["longest_place"]
    for key in ("formats", "layout"):
        values = [ledger[key] if key == "formats" else [ledger[key]] for ledger in every]
        found[key] = list(dict.fromkeys(value for several in values for value in several))
    found["layout"] = "; ".join(found["layout"])
    causes: dict[str, dict[str, Any]] = {"dropped": {}, "copies_left_out": {}}
    for key, found_causes in causes.items():
        for cause, tally in (pair for ledger in every for pair in ledger.get(key, {}).items()):
            _add(found_causes.setdefault(cause, {"rows": 0, "places": []}), tally)
    truncated: dict[str, Any] = {"rows": 0, "places": [], "tokens": 0}
    for ledger in every:
        _add(truncated, ledger["truncated"])
        truncated["tokens"] += ledger["truncated"]["tokens"]
    return {**found, **causes, "truncated": truncated}


def _add(total: dict[str, Any], tally: Mapping[str, Any]) -> None:
    total["rows"] += tally["rows"]
    total["places"] = [*total["places"], *tally["places"]][:SHOWN_PLACES]
