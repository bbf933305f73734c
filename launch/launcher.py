"""What a launcher is: it resolves the number of workers, renders a plan to text, and runs what was rendered."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..config.plan import Plan
from ..config.run import RunConfig

LOG_DIR = "logs"
FAILURE_FILE = "failure.json"
WORKER_MODULE = "dist_ft.worker"


@dataclass(frozen=True)
class Rendered:
    """Text of a plan: files of the run's folder, and the command that runs them from anywhere."""

    files: Mapping[str, str]  # name in the run's folder → content
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # beside the environment of who runs the command
    start: str = ""  # the command inside the files that becomes workers, for people


@dataclass(frozen=True)
class Job:
    """A run that was handed to a scheduler."""

    identity: str
    follow: str  # a command that shows its output
    log: Path


class Launcher(Protocol):
    """Turns a plan into processes. `render` is pure: text out, nothing touched."""

    def resolve(self, config: RunConfig) -> tuple[int, int]: ...
    def render(self, plan: Plan) -> Rendered: ...
    def submit(self, plan: Plan) -> Job | int: ...  # a job, or the exit code of a run in the foreground


def write_rendered(plan: Plan, rendered: Rendered) -> None:
    """Write the files into the run's folder, each whole or not at all; scripts become executable."""
    (plan.run_dir / LOG_DIR).mkdir(parents=True, exist_ok=True)
    for name, text in rendered.files.items():
        path = plan.run_dir / name
        new = path.with_name(f".{name}.new")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o755 if text.startswith("#!") else 0o644)
        os.replace(new, path)


def shell_lines(command: list[str]) -> str:
    """A command for a script, quoted, with one option a line where it is long."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--") or (word == "-m" and len(lines) > 1):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined = [" ".join(line) for line in lines]
    return (" \\\n  " if sum(map(len, joined)) > 100 else " ").join(joined)
