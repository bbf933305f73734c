"""Access to prepared splits from workers."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from ...state import REFERENCE, Row, Sample
from .joined import JoinedSamples, JoinedTable, join_ledgers
from .pack import Samples
from .repeats import DIGESTS
from .split import ROWS
from .table import TokenTable


@dataclass(frozen=True)
class Split:
    """Prepared split: the folders of its token table and samples, and its ledger (see ledger.py).

    The split of a mixture is the concatenation of its datasets, which `parts` holds by name. Its `table` and `samples`
    are then not folders but a hash of theirs.
    """

    table: str
    samples: str
    ledger: dict[str, Any]
    parts: Mapping[str, Split] = field(default_factory=dict)
    reference: np.ndarray | None = None  # [num_samples, num_sequences] float64 log-probabilities, see reference.py

    @classmethod
    def of_parts(cls, parts: Mapping[str, Split]) -> Split:
        """Return the split of a mixture."""
        names = "\n".join(f"{name} {Path(part.table).name}" for name, part in parts.items())
        name = hashlib.sha256(names.encode()).hexdigest()[:32]
        return cls(name, name, join_ledgers({name: part.ledger for name, part in parts.items()}), dict(parts))

    def open_table(self) -> TokenTable:
        """Open the tokenized rows by memory map, with the reference log-probabilities as a column if there are any."""
        if self.parts:
            kept = [part.ledger["rows_kept"] for part in self.parts.values()]
            return JoinedTable([part.open_table() for part in self._referring()], kept)
        table = TokenTable.open(self.table)
        if self.reference is None:
            return table
        values = np.full(len(table), np.nan)  # NaN for rows that are in no sample
        values[self.open_samples().rows] = self.reference.reshape(-1)
        return table.with_row_values(REFERENCE, values)

    def open_samples(self) -> Samples:
        """Open the samples by memory map."""
        if self.parts:
            rows = [len(part.open_table()) for part in self.parts.values()]
            return JoinedSamples([part.open_samples() for part in self.parts.values()], rows)
        return Samples.load(self.samples)

    def first_sample(self) -> Sample:
        """Return the first sample, on which two models are compared."""
        table, samples = self.open_table(), self.open_samples()
        return Sample([table.example(*segment) for segment in samples[0]], index=0)

    def read_rows(self) -> list[Row]:
        """Return the raw columns that the task keeps of each row (`state.Layout.kept`); empty for a training split."""
        if self.parts:
            return [row for part in self.parts.values() for row in part.read_rows()]
        path = Path(self.table) / ROWS
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
        )

    def digests(self) -> np.ndarray:
        """Return a digest of the tokens of each row, `[rows_kept]` uint64 (see repeats.py)."""
        if self.parts:
            return np.concatenate([part.digests() for part in self.parts.values()])
        found: np.ndarray = np.load(Path(self.table) / DIGESTS)
        return found

    def _referring(self) -> list[Split]:
        """Return the datasets, each with its slice of the reference."""
        if self.reference is None:
            return list(self.parts.values())
        shares = np.split(self.reference, np.cumsum(list(self.sizes.values()))[:-1])
        return [replace(part, reference=share) for part, share in zip(self.parts.values(), shares, strict=True)]

    @property
    def sizes(self) -> dict[str, int]:
        """Number of samples of each dataset of a mixture by name; empty without a mixture."""
        return {name: int(part.ledger["samples"]) for name, part in self.parts.items()}
