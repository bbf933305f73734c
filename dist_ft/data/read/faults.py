"""Unusable rows, counted by cause."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

SHOWN_PLACES = 3
EMPTY_TEXT = "the text is empty"


class RowFault(Exception):
    """Error for a row that cannot be used for training; rows with the same cause are counted together.

    Args:
        cause: Why the row cannot be used, the same text for all rows with this problem.
        way_out: How to solve the problem.
        seen: What this row has, which is shown for the first of the rows with this cause.
    """

    def __init__(self, cause: str, way_out: str, seen: str = "") -> None:
        super().__init__(cause)
        self.cause = cause
        self.way_out = way_out
        self.seen = seen

    def __str__(self) -> str:
        return describe_cause(self.cause, self.seen)


class InvalidRow(RowFault):
    """Error for a row that cannot be read or does not match its format; `data.invalid_rows=drop` drops it."""


def check_text(value: Any) -> None:
    """Check that all strings of a row are Unicode text, which escapes of JSON can break.

    Raises:
        InvalidRow: A string has half of a surrogate pair, which no tokenizer can encode.
    """
    if isinstance(value, str):
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as error:
            seen = f"{value[error.start : error.start + 1]!r} in {value[max(0, error.start - 20) : error.start]!r}"
            way_out = "correct the text: it was cut in the middle of a character"
            raise InvalidRow("a text has half of a surrogate pair", way_out, seen) from error
    elif isinstance(value, Mapping):
        for name, item in value.items():
            check_text(name)
            check_text(item)
    elif isinstance(value, list):
        for item in value:
            check_text(item)


def describe_cause(cause: str, seen: str) -> str:
    """Return the cause with what the first row has."""
    return f"{cause} (such as {seen})" if seen else cause


@dataclass
class Tally:
    """Count and first locations of the rows with one cause."""

    way_out: str
    seen: str = ""  # what the first row has
    key: str = ""  # key that drops these rows
    rows: int = 0
    places: list[str] = field(default_factory=list)  # locations of the first SHOWN_PLACES rows

    def add(self, place: str) -> None:
        """Count the row at `place`."""
        self.rows += 1
        if len(self.places) < SHOWN_PLACES:
            self.places.append(place)

    def merge(self, later: Tally) -> None:
        """Add the rows of a tally with the same cause that were read after those of this one."""
        self.rows += later.rows
        self.places = [*self.places, *later.places][:SHOWN_PLACES]
