"""What a check says."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """A problem stops every training here; a note, some."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """Nothing to do."""
    return Finding(name, Level.OK, detail)


def note(name: str, detail: str, remedy: str = "") -> Finding:
    """Something that only some runs need."""
    return Finding(name, Level.NOTE, detail, remedy)


def problem(name: str, detail: str, remedy: str) -> Finding:
    """Something without which nothing trains."""
    return Finding(name, Level.PROBLEM, detail, remedy)
