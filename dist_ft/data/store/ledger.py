"""Ledger that accounts for every row and token of a split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ...errors import Problem
from ..read.faults import InvalidRow, RowFault, Tally, describe_cause
from ..read.folders import SHOWN_FILES

TOO_LONG = "longer than task."
STOP_AFTER_FAULTS = 1000  # reading stops after this many invalid rows, since the split is an error anyway
SHOWN_CAUSES = 8


def too_long(key: str) -> str:
    """Return the cause for rows longer than `task.KEY`."""
    return TOO_LONG + key


@dataclass
class Ledger:
    """Row and token counts of one split.

    rows_read + augmented = rows_kept + all dropped; tokens = tokens_in_samples + tokens_left_over.
    """

    chosen: str = ""  # description of the row selection if only some rows of the source are read, see chosen.py
    rows_of_source: int = 0  # number of rows in the source in that case
    files: dict[str, int] = field(default_factory=dict)  # rows read of each file or Hub dataset
    rows_read: int = 0
    rows_kept: int = 0
    repeated: int = 0  # kept rows with the same tokens as an earlier row
    augmented: int = 0  # copies added by data.augment
    unchanged: int = 0  # copies not added because they equal their row or an earlier copy
    copies_left_out: dict[str, Tally] = field(default_factory=dict)  # by cause
    dropped: dict[str, Tally] = field(default_factory=dict)  # by cause
    refused: dict[str, Tally] = field(default_factory=dict)  # by cause; any of these makes the split an error
    truncated: Tally = field(default_factory=lambda: Tally(""))
    truncated_tokens: int = 0
    longest: int = 0  # tokens of the longest sequence of a row, before truncation
    longest_place: str = ""
    longest_by_limit: dict[str, int] = field(default_factory=dict)  # longest refused length by exceeded key of task
    max_token_id: int = -1
    formats: list[str] = field(default_factory=list)
    layout: str = ""
    tokens: int = 0
    samples: int = 0
    tokens_in_samples: int = 0
    tokens_left_over: int = 0  # tokens of blocks without targets
    supervised_tokens: int = 0  # number of targets, after the label shift

    def drop(self, cause: str, place: str, seen: str = "") -> None:
        """Count a row that is dropped as configured."""
        self.dropped.setdefault(cause, Tally("", seen)).add(place)

    def leave_out(self, fault: RowFault, place: str) -> None:
        """Count an augmented copy that cannot be used; its original row is kept."""
        self.copies_left_out.setdefault(fault.cause, Tally("")).add(place)

    def refuse(self, fault: RowFault, place: str) -> None:
        """Count an invalid row."""
        key = "data.invalid_rows" if isinstance(fault, InvalidRow) else "task.unsupervised"
        self.refused.setdefault(fault.cause, Tally(fault.way_out, fault.seen, key)).add(place)

    @property
    def is_hopeless(self) -> bool:
        """Whether STOP_AFTER_FAULTS is reached, so that reading should stop."""
        return sum(tally.rows for tally in self.refused.values()) >= STOP_AFTER_FAULTS

    def merge(self, later: Ledger) -> None:
        """Add the rows of a ledger that were read after those of this one."""
        for key in ("rows_read", "rows_kept", "augmented", "unchanged", "truncated_tokens"):
            setattr(self, key, getattr(self, key) + getattr(later, key))
        for source, rows in later.files.items():
            self.files[source] = self.files.get(source, 0) + rows
        for mine, more in (
            (self.dropped, later.dropped),
            (self.refused, later.refused),
            (self.copies_left_out, later.copies_left_out),
        ):
            for cause, tally in more.items():
                mine.setdefault(cause, Tally(tally.way_out, tally.seen, tally.key)).merge(tally)
        self.truncated.merge(later.truncated)
        if later.longest > self.longest:
            self.longest, self.longest_place = later.longest, later.longest_place
        for key, length in later.longest_by_limit.items():
            self.longest_by_limit[key] = max(self.longest_by_limit.get(key, 0), length)
        self.max_token_id = max(self.max_token_id, later.max_token_id)
        self.formats += [name for name in later.formats if name not in self.formats]

    def problems(self, split: str, limits: Mapping[str, int]) -> list[Problem]:
        """Return the problems of the split, given the length limits of the task by key."""
        found = []
        causes = dict(self.refused)
        for key, limit in limits.items():
            if tally := causes.pop(too_long(key), None):
                longest = self.longest_by_limit[key]
                rule = (
                    f"{_rows(tally.rows)} longer than task.{key}={limit}; the longest row read has {longest} "
                    f"tokens, at {self.longest_place}; first at {', '.join(tally.places)}"
                )
                way_out = f"set task.{key}={longest}, or set task.overlong=truncate or drop"
                found.append(Problem(f"data.{split}", rule, way_out))
        if causes:
            total = sum(tally.rows for tally in causes.values())
            shown = sorted(causes.items(), key=lambda pair: -pair[1].rows)[:SHOWN_CAUSES]
            parts = [
                f"{tally.rows} because {describe_cause(cause, tally.seen)}, first at {', '.join(tally.places)}"
                for cause, tally in shown
            ]
            if more := total - sum(tally.rows for _, tally in shown):
                parts.append(f"{more} for {len(causes) - len(shown)} other reasons")
            rule = f"{_rows(total)} (of {self.rows_read} read) cannot be used: {'; '.join(parts)}"
            ways = dict.fromkeys(tally.way_out for _, tally in shown)
            keys = " and ".join(f"{key}=drop" for key in dict.fromkeys(tally.key for tally in causes.values()))
            found.append(Problem(f"data.{split}", rule, "; ".join([*ways, f"or drop these rows: set {keys}"])))
        return found

    def to_json(self) -> dict[str, Any]:
        """Return the content of the ledger file as JSON types."""
        content = asdict(self)
        for key in ("dropped", "refused", "copies_left_out"):
            content[key] = {
                cause: {"rows": tally["rows"], "places": tally["places"]} for cause, tally in content[key].items()
            }
        content["truncated"] = {
            "rows": self.truncated.rows,
            "places": self.truncated.places,
            "tokens": content.pop("truncated_tokens"),
        }
        del content["refused"], content["longest_by_limit"]
        return content


def _rows(count: int) -> str:
    at_least = "at least " if count >= STOP_AFTER_FAULTS else ""
    return f"{at_least}{count} row{'s' if count != 1 else ''}"


def describe_files(files: Mapping[str, int]) -> str:
    """Return the names of the first files that were read, each with its number of rows."""
    shown = ", ".join(
        f"{rows:,} row{'s' * (rows != 1)} of {Path(name).name}" for name, rows in list(files.items())[:SHOWN_FILES]
    )
    return shown + (f", and {len(files) - SHOWN_FILES} more" if len(files) > SHOWN_FILES else "")
