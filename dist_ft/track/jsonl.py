"""metrics.jsonl: one JSON object per logged step, without duplicate steps after the run has been resumed."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..state import Metrics


class JsonLines:
    """Tracker that appends metrics to a JSON Lines file; all metrics of a step are merged into one object.

    Args:
        path: Path of the file, whose folder must exist.
        after_step: Step that the run resumes from. The lines of later steps are deleted, because these steps are
            trained again. With 0, the file is replaced by an empty one.
    """

    def __init__(self, path: Path, *, after_step: int = 0) -> None:
        lines = [line for line in read_metrics(path) if line["step"] <= after_step] if after_step else []
        staging = path.with_name(f".{path.name}.new")
        with staging.open("wb") as file:
            file.writelines(_encode(line) for line in lines)
            file.flush()
            os.fsync(file.fileno())
        staging.replace(path)
        self._handle = os.open(path, os.O_WRONLY)
        self._last = dict(lines[-1]) if lines else {}
        self._end = os.fstat(self._handle).st_size
        self._start = self._end - len(_encode(self._last)) if lines else 0

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Add `metrics` to the line of `step`; they have been written to the file when this returns."""
        if step == self._last.get("step"):
            self._last |= metrics
        else:
            self._last = {"step": step, **metrics}
            self._start = self._end
        # A single write, so that a crash can leave at most the last line incomplete.
        line = _encode(self._last)
        os.pwrite(self._handle, line, self._start)
        self._end = self._start + len(line)
        os.ftruncate(self._handle, self._end)

    def close(self, error: BaseException | None = None) -> None:
        """Sync the file to disk and close it; further calls have no effect."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # a full disk must not mask the error that ended the run
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """Yield the objects of a metrics.jsonl file; incomplete lines are skipped, and a missing file counts as empty."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    yield value


def read_evaluations(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """Return the first and the last evaluation in a metrics.jsonl file, each with its `step` and `eval/…` metrics.

    Both are empty if the file has no evaluation, and equal if it has only one.
    """
    evaluations = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("eval/")}
        for line in read_metrics(path)
        if any(name.startswith("eval/") for name in line)
    ]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})


def _encode(line: Mapping[str, Any]) -> bytes:
    """Encode a line as strict JSON, which has no NaN and infinity; these are replaced by null."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain, ensure_ascii=False).encode() + b"\n"
