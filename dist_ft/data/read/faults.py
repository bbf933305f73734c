"""Unusable rows, counted by cause."""

from __future__ import annotations

from dataclasses import dataclass, field

SHOWN_PLACES = 3
EMPTY_TEXT = "the text is empty"


class RowFault(Exception):
    """Error for a row that cannot be used for training; rows with the same cause are counted together.

    Args:
        cause: Why the row cannot be used, the same text for all rows with this problem.
        way_out: How to solve the problem.
    """

    def __init__(self, cause: str, way_out: str) -> None:
        super().__init__(cause)
        self.cause = cause
        self.way_out = way_out


@dataclass
class Tally:
    """Count and first locations of the rows with one cause."""

    way_out: str
    rows: int = 0
    places: list[str] = field(default_factory=list)  # locations of the first SHOWN_PLACES rows

    def add(self, place: str) -> None:
        """Count the row at `place`."""
        self.rows += 1
        if len(self.places) < SHOWN_PLACES:
            self.places.append(place)
