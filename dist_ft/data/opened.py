"""Prepared splits as workers read them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..state import Row, Sample
from .joined import JoinedSamples, JoinedTable, join_ledgers
from .pack import Samples
from .split import ROWS
from .table import TokenTable


@dataclass(frozen=True)
class Split:
    """A prepared split: where its token table and samples are, and its ledger (see data/ledger.py).

    Of a mixture, `parts` are its sets by name, and what the split gives is all of them, one after another; its
    `table` and `samples` are then no folders but a name made of theirs.
    """

    table: str
    samples: str
    ledger: dict[str, Any]
    parts: Mapping[str, Split] = field(default_factory=dict)

    @classmethod
    def of_parts(cls, parts: Mapping[str, Split]) -> Split:
        """The split of a mixture."""
        names = "\n".join(f"{name} {Path(part.table).name}" for name, part in parts.items())
        name = hashlib.sha256(names.encode()).hexdigest()[:32]
        return cls(name, name, join_ledgers({name: part.ledger for name, part in parts.items()}), dict(parts))

    def open_table(self) -> TokenTable:
        """The tokenised rows, memory-mapped."""
        if self.parts:
            kept = [part.ledger["rows_kept"] for part in self.parts.values()]
            return JoinedTable([part.open_table() for part in self.parts.values()], kept)
        return TokenTable.open(self.table)

    def open_samples(self) -> Samples:
        """What places in a batch hold, memory-mapped."""
        if self.parts:
            rows = [len(part.open_table()) for part in self.parts.values()]
            return JoinedSamples([part.open_samples() for part in self.parts.values()], rows)
        return Samples.load(self.samples)

    def first_sample(self) -> Sample:
        """What is looked at when two models are compared."""
        table, samples = self.open_table(), self.open_samples()
        return Sample([table.example(*segment) for segment in samples[0]], index=0)

    def read_rows(self) -> list[Row]:
        """What the task keeps of each row as it was (state.Layout.kept); nothing of a training split."""
        if self.parts:
            return [row for part in self.parts.values() for row in part.read_rows()]
        path = Path(self.table) / ROWS
        return (
            [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line] if path.exists() else []
        )

    @property
    def sizes(self) -> dict[str, int]:
        """Samples of each set of a mixture; empty of a split that is none."""
        return {name: int(part.ledger["samples"]) for name, part in self.parts.items()}
