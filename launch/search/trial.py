"""A trial of a search that has ended."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["complete", "pruned", "failed"]


@dataclass(frozen=True)
class Outcome:
    """How a trial ended: state, score (None after a failure), exit code, and duration in seconds."""

    state: State
    score: float | None
    exit_code: int
    seconds: float


@dataclass(frozen=True)
class Trial:
    """A trial that has ended: its number, the chosen values by key, and how it ended."""

    number: int
    values: dict[str, str]
    outcome: Outcome


def trial_name(number: int) -> str:
    """Return the name of the folder of a trial."""
    return f"trial-{number:03d}"
