"""Findings of the checks."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


class Level(Enum):
    """Severity: a problem prevents every run on this machine, a note affects only some runs."""

    OK = "ok"
    NOTE = "note"
    PROBLEM = "problem"


@dataclass(frozen=True)
class Finding:
    """One line of the report."""

    name: str
    level: Level
    detail: str
    remedy: str = ""


def ok(name: str, detail: str) -> Finding:
    """Create a finding that requires no action."""
    return Finding(name, Level.OK, detail)


def note(name: str, detail: str, remedy: str = "") -> Finding:
    """Create a finding that affects only some runs."""
    return Finding(name, Level.NOTE, detail, remedy)


def problem(name: str, detail: str, remedy: str) -> Finding:
    """Create a finding that prevents every run."""
    return Finding(name, Level.PROBLEM, detail, remedy)
