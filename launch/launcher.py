"""Launcher protocol: resolve the number of workers, render a plan to text, and start the rendered command."""

from __future__ import annotations

import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from ..config.plan import LOG_DIR, Plan
from ..config.run import RunConfig

WORKER_MODULE = "dist_ft.worker"
GPUS = "launch.gpus_per_node"


@dataclass(frozen=True)
class Rendered:
    """A rendered plan: files for the folder of the run, and the command that executes them."""

    files: Mapping[str, str]  # file name in the folder of the run → content
    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)  # variables to add to the environment of the command
    start: str = ""  # the command inside the script that starts the workers, for display
    notes: tuple[str, ...] = ()  # the values of `auto` keys of the launcher, for display


@dataclass(frozen=True)
class Job:
    """A run that was submitted to a scheduler."""

    identity: str
    follow: str  # command that follows the output of the job
    log: Path


@dataclass(frozen=True)
class Workers:
    """The workers of a run, and the configuration in which keys of the launcher that depend on them are settled."""

    config: RunConfig
    origins: Mapping[str, str]  # those of settled keys begin with `AUTO` and give the reason
    nodes: int
    per_node: int
    have_bfloat16: bool  # whether they have GPUs that compute in bfloat16, as far as this machine knows


class Launcher(Protocol):
    """Interface of a launcher.

    `resolve` returns the workers of a run. `render` is pure: what it returns depends on the plan only, and it changes
    nothing. `submit` starts the run and returns a job, or the exit code of a run in the foreground.
    """

    def resolve(self, config: RunConfig, origins: Mapping[str, str]) -> Workers: ...
    def render(self, plan: Plan) -> Rendered: ...
    def submit(self, plan: Plan) -> Job | int: ...


def write_rendered(plan: Plan, rendered: Rendered) -> None:
    """Write the rendered files atomically into the folder of the run, and make scripts executable."""
    (plan.run_dir / LOG_DIR).mkdir(parents=True, exist_ok=True)
    for name, text in rendered.files.items():
        path = plan.run_dir / name
        new = path.with_name(f".{name}.new")
        new.write_text(text, encoding="utf-8")
        new.chmod(0o755 if text.startswith("#!") else 0o644)
        os.replace(new, path)


def shell_lines(command: list[str]) -> str:
    """Quote a command for a shell script; a long command gets one option per line."""
    lines: list[list[str]] = [[]]
    for word in command:
        if word.startswith("--") or (word == "-m" and len(lines) > 1):
            lines.append([])
        lines[-1].append(shlex.quote(word))
    joined = [" ".join(line) for line in lines]
    return (" \\\n  " if sum(map(len, joined)) > 100 else " ").join(joined)
