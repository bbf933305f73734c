"""Keeps report.html of a run up to date, in a process of its own with the lowest priority, see dist_ft/report/write.py.

Its output goes to the log of rank 0. Training never waits for it, and no error of it ends a run.
"""

from __future__ import annotations

import math
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from ..config.plan import METRICS_FILE
from ..config.track import TrackConfig
from ..protocols import Tracker
from ..state import Metrics
from .compose import NullTracker

INTERVAL_S = 60.0
BYTES_PER_S = 2**20  # each of so many bytes of metrics.jsonl makes reports a second rarer, as they take longer
LAST_LIMIT_S = 60.0
COMMAND = (sys.executable, "-m", "dist_ft.report.write")


class ReportTracker:
    """Tracker that writes the report again after a while, unless it is still being written.

    Args:
        run_dir: Folder of the run.
        command: Command that writes the report, without the folder.
        interval_s: Shortest time between two starts of it.
    """

    def __init__(self, run_dir: Path, command: Sequence[str] = COMMAND, *, interval_s: float = INTERVAL_S) -> None:
        self._metrics = run_dir / METRICS_FILE
        self._command = [*command, str(run_dir)]
        self._interval_s = interval_s
        self._process: subprocess.Popen[bytes] | None = None
        self._due_at = time.monotonic() + interval_s

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Start writing the report if it is time."""
        if time.monotonic() < self._due_at or (self._process is not None and self._process.poll() is None):
            return
        try:
            self._due_at = time.monotonic() + self._interval_s + self._metrics.stat().st_size / BYTES_PER_S
            self._process = subprocess.Popen(self._command, stdin=subprocess.DEVNULL)
        except OSError as error:
            self._due_at, self._process = math.inf, None
            print(f"the report is not written while the run trains: {error}", flush=True)

    def close(self, error: BaseException | None = None) -> None:
        """End a report that is being written, so that it does not replace the last one."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


def open_report(config: TrackConfig, run_dir: Path) -> Tracker:
    """Build the tracker of a run's report."""
    return ReportTracker(run_dir) if config.report else NullTracker()


def write_last(run_dir: Path, command: Sequence[str] = COMMAND, limit_s: float = LAST_LIMIT_S) -> str | None:
    """Write the report once more and wait for it; return why it was not written, or None."""
    try:
        done = subprocess.run(
            [*command, str(run_dir)], stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=limit_s, check=False
        )
    except subprocess.TimeoutExpired:
        return f"it took longer than {limit_s:g} s; write it with `dist-ft report run={run_dir}`"
    except OSError as error:
        return str(error)
    told = done.stderr.decode(errors="replace").strip()
    print(told, flush=True)  # in the log of this rank
    return (told.splitlines() or [f"exit code {done.returncode}"])[-1] if done.returncode else None
