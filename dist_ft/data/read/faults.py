"""Rows that cannot be learned from, counted by cause."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_PLACES = 3
EMPTY_TEXT = "the text is empty"


class RowFault(Exception):
    """A row from which nothing can be learned; equal causes are counted together."""

    def __init__(self, cause: str, way_out: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.way_out = way_out


@dataclass
class Tally:
    """Rows of one cause."""

    way_out: str
    rows: int = 0
    places: list[str] = field(default_factory=list)  # the first few

    def add(self, place: str) -> None:
        """Count a row."""
        self.rows += 1
        if len(self.places) < SHOWN_PLACES:
            self.places.append(place)
