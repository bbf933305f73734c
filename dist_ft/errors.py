"""What can go wrong, by who can mend it; the exit code of a command is that of its error.

A user's fault or a broken machine raises one of these; `assert` is for our own mistakes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One thing to mend: where it stands (a key, a file and line, a host), what rule it breaks, the way out."""

    where: str
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}\n    → {self.way_out}"


class DistFtError(Exception):
    """Base of the errors that a user sees without a traceback."""

    exit_code: int
    title: str

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error names at least one problem"
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def of(cls, where: str, rule: str, way_out: str) -> DistFtError:
        """The error of a single problem."""
        return cls(Problem(where, rule, way_out))

    def __reduce__(self) -> tuple[type[DistFtError], tuple[Problem, ...]]:
        return type(self), tuple(self.problems)


class RequestError(DistFtError):
    """The request is wrong: configuration, data or model as the user named them. Nothing was started."""

    exit_code = 2
    title = "the request is wrong"


class MachineError(DistFtError):
    """The environment is wrong: a missing package, host, port, disk or device."""

    exit_code = 3
    title = "the environment is wrong"


class TrainingError(DistFtError):
    """Training failed after it had begun."""

    exit_code = 4
    title = "training failed"


class Stopped(DistFtError):
    """Stopped on request with a checkpoint; the same command goes on from there."""

    exit_code = 75
    title = "stopped on request"
