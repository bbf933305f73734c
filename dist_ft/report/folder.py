"""What a run's folder holds about the run, read without torch; files that are missing or incomplete count as absent."""

from __future__ import annotations

import datetime
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..config.plan import (
    CHECKPOINTS,
    EXPORT,
    FAILURE_FILE,
    METRICS_FILE,
    RECORD_FILE,
    Plan,
    read_plan,
    saved_steps,
)
from ..errors import Stopped
from ..process.owner import is_owned
from .curves import Curve, read_curves

SHOWN_PREDICTIONS = 10
LONGEST_LINE = 1_000_000  # characters of a prediction that are read


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint in the run's folder."""

    name: str
    size: int  # bytes
    notes: tuple[str, ...]  # latest, best


@dataclass(frozen=True)
class RunFolder:
    """Content of a run's folder."""

    path: Path
    plan: Plan
    status: str  # planned, running, finished, stopped, failed or ended (killed, without a report)
    curves: Mapping[str, Curve]
    record: Mapping[str, Any]  # see inspect/record.py
    failure: Mapping[str, Any]
    checkpoints: tuple[Checkpoint, ...]
    exported: bool
    read_at: datetime.datetime
    evaluations: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)  # file name → content of eval-*.json
    predictions: Mapping[str, list[Mapping[str, Any]]] = field(default_factory=dict)  # file name → first rows

    @property
    def name(self) -> str:
        """The run's name."""
        return self.plan.config.run_name

    @property
    def step(self) -> int:
        """The last logged training step, or 0."""
        last = max((c.last.step for name, c in self.curves.items() if c.last and name == "train/loss"), default=0)
        return int(last)


def read_folder(path: Path) -> RunFolder:
    """Read a run's folder.

    Raises:
        RequestError: The folder has no valid run.yaml.
    """
    plan = read_plan(path)
    path = path if path.is_dir() else path.parent
    record = read_object(path / RECORD_FILE)
    failure = read_object(path / FAILURE_FILE)
    curves = read_curves(path / METRICS_FILE)
    exported = (path / EXPORT / "README.md").exists()
    return RunFolder(
        path=path,
        plan=plan,
        status=find_status(path, plan, record, failure, has_steps=bool(curves)),
        curves=curves,
        record=record,
        failure=failure,
        checkpoints=tuple(read_checkpoints(path / CHECKPOINTS)),
        exported=exported,
        read_at=datetime.datetime.now(datetime.timezone.utc),
        evaluations={file.name: read_object(file) for file in sorted(path.glob("eval-*.json"))},
        predictions={file.name: read_first(file) for file in sorted(path.glob("predictions-*.jsonl"))},
    )


def find_status(
    path: Path, plan: Plan, record: Mapping[str, Any], failure: Mapping[str, Any], *, has_steps: bool
) -> str:
    """Return how the run stands; a folder that no process owns belongs to a run that has ended."""
    if failure:
        return "stopped" if failure.get("exit_code") == Stopped.exit_code else "failed"
    started = datetime.datetime.fromisoformat(str(record.get("started", plan.created)))
    if started.tzinfo is None:
        started = started.replace(tzinfo=datetime.timezone.utc)
    card = path / EXPORT / "README.md"
    if card.exists() and card.stat().st_mtime >= started.timestamp():  # and not the export of an earlier start
        return "finished"
    if is_owned(path):
        return "running"
    return "ended" if record or has_steps else "planned"


def read_object(path: Path) -> dict[str, Any]:
    """Return the JSON object of a file; empty if there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return value if isinstance(value, dict) else {}


def read_first(path: Path) -> list[Mapping[str, Any]]:
    """Return the first objects of a JSON Lines file."""
    rows: list[Mapping[str, Any]] = []
    try:
        with path.open(encoding="utf-8", errors="replace") as file:
            for line in islice(file, SHOWN_PREDICTIONS):
                value = json.loads(line) if len(line) <= LONGEST_LINE else None
                if isinstance(value, dict):
                    rows.append(value)
    except (OSError, ValueError):
        pass
    return rows


def read_checkpoints(folder: Path) -> list[Checkpoint]:
    """Return the checkpoints, oldest first."""
    links = {name: (folder / name).resolve().name for name in ("latest", "best") if (folder / name).exists()}
    found = []
    for path in reversed(saved_steps(folder)):
        size = sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
        found.append(Checkpoint(path.name, size, tuple(name for name, step in links.items() if step == path.name)))
    return found
