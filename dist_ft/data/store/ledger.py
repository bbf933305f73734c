"""What became of every row and token of a split; the sums agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ...errors import Problem
from ..read.faults import RowFault, Tally

TOO_LONG = "longer than task."
STOP_AFTER_FAULTS = 1000  # rows that are errors anyway: the rest need not be read to say so


def too_long(key: str) -> str:
    """The cause of a row longer than `task.KEY`."""
    return TOO_LONG + key


@dataclass
class Ledger:
    """Counts of one split.

    rows_read + augmented = rows_kept + all dropped; tokens = tokens_in_samples + tokens_left_over.
    """

    chosen: str = ""  # why only some rows of the source were read, see chosen.py
    rows_of_source: int = 0  # then
    rows_read: int = 0
    rows_kept: int = 0
    repeated: int = 0  # of them, those that have the tokens of an earlier one
    augmented: int = 0  # copies that data.augment has added to the rows read
    unchanged: int = 0  # copies that came out as their row or an earlier copy, and were not added
    copies_left_out: dict[str, Tally] = field(default_factory=dict)  # by cause
    dropped: dict[str, Tally] = field(default_factory=dict)  # by cause
    refused: dict[str, Tally] = field(default_factory=dict)  # by cause: these make the split an error
    truncated: Tally = field(default_factory=lambda: Tally(""))
    truncated_tokens: int = 0
    longest: int = 0  # tokens of the longest row, before any truncation
    longest_place: str = ""
    longest_by_limit: dict[str, int] = field(default_factory=dict)  # of rows refused, by the key they are beyond
    max_token_id: int = -1
    formats: list[str] = field(default_factory=list)
    layout: str = ""
    tokens: int = 0
    samples: int = 0
    tokens_in_samples: int = 0
    tokens_left_over: int = 0  # in blocks in which nothing is predicted
    supervised_tokens: int = 0  # targets, after the shift

    def drop(self, cause: str, place: str) -> None:
        """Count a row that is left out as the configuration wishes."""
        self.dropped.setdefault(cause, Tally("")).add(place)

    def leave_out(self, fault: RowFault, place: str) -> None:
        """Count a changed copy from which nothing is learned; its row stays."""
        self.copies_left_out.setdefault(fault.cause, Tally("")).add(place)

    def refuse(self, fault: RowFault, place: str) -> bool:
        """Count a row that is an error; True when there are so many that reading on is of no use."""
        self.refused.setdefault(fault.cause, Tally(fault.way_out)).add(place)
        return sum(tally.rows for tally in self.refused.values()) >= STOP_AFTER_FAULTS

    def problems(self, split: str, limits: Mapping[str, int]) -> list[Problem]:
        """What is wrong with the split, by kind and cause; `limits` are those of the task, by key."""
        found = []
        causes = dict(self.refused)
        for key, limit in limits.items():
            if tally := causes.pop(too_long(key), None):
                longest = self.longest_by_limit[key]
                rule = (
                    f"{_rows(tally.rows)} longer than task.{key}={limit}; the longest read has {longest} "
                    f"tokens, at {self.longest_place}; first at {', '.join(tally.places)}"
                )
                way_out = f"set task.{key}={longest}, or task.overlong=truncate or drop"
                found.append(Problem(f"data.{split}", rule, way_out))
        if causes:
            total = sum(tally.rows for tally in causes.values())
            parts = [
                f"{tally.rows} because {cause}, first at {', '.join(tally.places)}" for cause, tally in causes.items()
            ]
            rule = f"{_rows(total)} from which nothing is learned (of {self.rows_read} read): {'; '.join(parts)}"
            ways = dict.fromkeys(tally.way_out for tally in causes.values())
            found.append(
                Problem(f"data.{split}", rule, "; ".join([*ways, "or leave them out: task.unsupervised=drop"]))
            )
        return found

    def to_json(self) -> dict[str, Any]:
        """For the file beside the table."""
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
