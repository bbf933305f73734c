"""The first failure of a run is shown once; the others only stop.

The worker that fails first claims `failure.json` in the run's folder and prints the report; a rank that fails because
another one did finds it claimed and stays quiet. Its own traceback stands in its log.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
import traceback
from pathlib import Path
from typing import TextIO

from ..config.plan import FAILURE_FILE
from ..errors import DistFtError, TrainingError
from .place import Place


def forget(run_dir: Path, started: float) -> None:
    """Remove the report of an earlier start; one that is younger than `started` (Unix time) is a peer's."""
    path = run_dir / FAILURE_FILE
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < started:
            path.unlink()


def report(error: BaseException, place: Place, run_dir: Path, terminal: TextIO) -> int:
    """Log `error`, show it if it is the run's first, and return the exit code for it."""
    print("".join(traceback.format_exception(error)), flush=True)
    code = error.exit_code if isinstance(error, DistFtError) else TrainingError.exit_code
    text = describe(error, place, run_dir)
    if claim(run_dir, place, code, text):
        print(text, file=terminal, flush=True)
    return code


def describe(error: BaseException, place: Place, run_dir: Path) -> str:
    """The report: what, where, and the way out."""
    if isinstance(error, DistFtError):
        return f"dist-ft: {error.title} ({place})\n" + "\n".join(f"  {problem}" for problem in error.problems)
    lines = [
        f"dist-ft: {TrainingError.title} ({place})",
        f"  {type(error).__name__}: {str(error).strip() or 'no message'}",
        f"    → traceback and all output of this rank: {run_dir / 'logs' / f'rank-{place.rank}.log'}",
    ]
    if isinstance(error, MemoryError) or "out of memory" in str(error):
        lines.append(
            "    → less memory: train.per_device_train_batch_size, task.max_length, model.gradient_checkpointing=true, "
            "engine=fsdp or zero3"
        )
    if frames := traceback.extract_tb(error.__traceback__):
        lines.append(f"    at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")
    return "\n".join(lines)


def claim(run_dir: Path, place: Place, exit_code: int, text: str) -> bool:
    """Whether this is the first failure of the run; if so it stands in failure.json now."""
    record = {"rank": place.rank, "host": place.host, "exit_code": exit_code, "time": time.time(), "report": text}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / FAILURE_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError:  # no room or no folder: better said by several ranks than by none
        return True
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(record, file)
    return True
