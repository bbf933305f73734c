"""Errors that commands report without a traceback; each class defines the exit code of the command.

Invalid input and an unsuitable environment raise one of these errors; `assert` is for bugs in this package.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """One problem to report: where it is (a key, a file and line, a host), what is wrong, and how to fix it."""

    where: str
    rule: str
    way_out: str

    def __str__(self) -> str:
        return f"{self.where}: {self.rule}\n    → {self.way_out}"


class DistFtError(Exception):
    """Base class of the errors that are shown without a traceback; holds one or more problems."""

    exit_code: int
    title: str

    def __init__(self, *problems: Problem) -> None:
        assert problems, "an error names at least one problem"
        self.problems: Sequence[Problem] = problems
        super().__init__("\n".join(str(problem) for problem in problems))

    @classmethod
    def of(cls, where: str, rule: str, way_out: str) -> DistFtError:
        """Create an error with a single problem."""
        return cls(Problem(where, rule, way_out))

    def __reduce__(self) -> tuple[type[DistFtError], tuple[Problem, ...]]:
        return type(self), tuple(self.problems)


class RequestError(DistFtError):
    """Invalid request: the configuration, the data or the model that the user specified. No worker was started."""

    exit_code = 2
    title = "invalid request"


class MachineError(DistFtError):
    """Unsuitable environment: a problem with a package, host, port, disk or device."""

    exit_code = 3
    title = "unsuitable environment"


class TrainingError(DistFtError):
    """Failure after training has started."""

    exit_code = 4
    title = "training failed"


class Stopped(DistFtError):
    """Run stopped on request after saving a checkpoint; the same command resumes from it."""

    exit_code = 75
    title = "stopped on request"
