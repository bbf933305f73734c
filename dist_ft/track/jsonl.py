"""metrics.jsonl: one JSON object a logged step, whole lines only, each step once however often a run is resumed."""

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
    """Appends metrics to `path`; what is logged of one step in several calls stands in one object.

    Args:
        path: the file; its folder must exist.
        after_step: the step that the run goes on from. Lines of later steps are dropped, for they come again. 0 begins
            a new file.
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
        """Add `metrics` to the line of `step`; the file holds them when this returns."""
        if step == self._last.get("step"):
            self._last |= metrics
        else:
            self._last = {"step": step, **metrics}
            self._start = self._end
        # One write: a reader sees the line before or after, and a crash leaves at worst a torn last line.
        line = _encode(self._last)
        os.pwrite(self._handle, line, self._start)
        self._end = self._start + len(line)
        os.ftruncate(self._handle, self._end)

    def close(self) -> None:
        """Bring the file to the disk and close it; a second call does nothing."""
        if self._handle >= 0:
            with contextlib.suppress(OSError):  # a full disk must not hide what ended the run
                os.fsync(self._handle)
            os.close(self._handle)
            self._handle = -1


def read_metrics(path: Path) -> Iterator[dict[str, Any]]:
    """The objects of a metrics.jsonl; a line torn by a crash is left out, a missing file has none."""
    if not path.exists():
        return
    with path.open(encoding="utf-8", errors="replace") as file:
        for line in file:
            with contextlib.suppress(ValueError):
                value = json.loads(line)
                if isinstance(value, dict) and isinstance(value.get("step"), int):
                    yield value


def read_evaluations(path: Path) -> tuple[dict[str, float], dict[str, float]]:
    """The first and the last evaluation (`eval/…` names and `step`); empty where there is none, equal where one."""
    evaluations = [
        {name: value for name, value in line.items() if name == "step" or name.startswith("eval/")}
        for line in read_metrics(path)
        if any(name.startswith("eval/") for name in line)
    ]
    return (evaluations[0], evaluations[-1]) if evaluations else ({}, {})


def _encode(line: Mapping[str, Any]) -> bytes:
    """One line; what is not a number in JSON (nan, inf) becomes null, so that every reader can read it."""
    plain = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in line.items()}
    return json.dumps(plain, ensure_ascii=False).encode() + b"\n"
