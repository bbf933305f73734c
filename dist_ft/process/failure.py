"""Failure reports: only the first failure of a run is shown.

The worker that fails first claims `failure.json` in the run's folder and prints the report. A rank that fails as a
consequence finds the file claimed and prints nothing; its traceback is in its log. A rank that lost a connection waits
for the report of the rank at its other end, which is the cause, or of that rank's monitor (monitor.py).
"""

from __future__ import annotations

import contextlib
import enum
import json
import os
import time
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from ..config.plan import FAILURE_FILE
from ..errors import DistFtError, Stopped, TrainingError

if TYPE_CHECKING:
    from .place import Place

OTHERS_S = 2.0  # how long a rank waits for a report of the cause
STOPPED_S = 0.6  # the same for a rank that is asked to stop, which launchers do when another one has died
POLL_S = 0.05
LOST = (  # words of gloo, NCCL and the store for it, in lower case
    "by peer", "broken pipe", "socket closed", "got 0 bytes", "connection was likely closed", "remote process exited"
)  # fmt: skip


class Kind(str, enum.Enum):
    """What ended a run, by which a launcher decides whether to start it again."""

    ERROR = "error"  # told by this package, or memory that does not suffice: it would happen again
    EXCEPTION = "exception"  # of Python or a library
    LOST = "lost connection"
    DIED = "died"
    HUNG = "hung"


def forget(run_dir: Path, started: float) -> None:
    """Remove the report of an earlier start; a report newer than `started` (Unix time) is from another rank."""
    path = run_dir / FAILURE_FILE
    with contextlib.suppress(FileNotFoundError):
        if path.stat().st_mtime < started:
            path.unlink()


def report(
    error: BaseException,
    code: int | None = None,
    *,
    place: Place,
    run_dir: Path,
    terminal: TextIO,
    kind: Kind | None = None,
    patience_s: float = 0.0,
) -> int:
    """Log `error`, print it if it is the first failure of the run, and return its exit code, unless `code` is given.

    Args:
        error: What ended this rank.
        code: Exit code of this rank.
        place: Place of this rank.
        run_dir: Folder of the run.
        terminal: Stream to which the report is printed.
        kind: What `error` is; found by its type if None.
        patience_s: Seconds to wait for a report of the cause; `OTHERS_S` if the error is a lost connection.
    """
    print("".join(traceback.format_exception(error)), flush=True)
    if has_lost_connection(error):
        patience_s = OTHERS_S
    deadline = time.monotonic() + patience_s
    while time.monotonic() < deadline and not (run_dir / FAILURE_FILE).exists():
        time.sleep(POLL_S)
    if code is None:
        code = error.exit_code if isinstance(error, DistFtError) else TrainingError.exit_code
    text, cause = describe(error, place, run_dir), error.problems[0].where if isinstance(error, Stopped) else None
    if claim(run_dir, place, code, text, kind or kind_of(error), cause):
        print(text, file=terminal, flush=True)
    return code


def has_lost_connection(error: BaseException) -> bool:
    """Return whether an error, or what it was raised from, is a connection to another rank that was closed."""
    causes = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    return any(words in str(cause).lower() for cause in causes for words in LOST)


def kind_of(error: BaseException) -> Kind:
    """Return what an error of this process is."""
    if has_lost_connection(error):
        return Kind.LOST
    return Kind.ERROR if isinstance(error, DistFtError) or _is_out_of_memory(error) else Kind.EXCEPTION


def _is_out_of_memory(error: BaseException) -> bool:
    return isinstance(error, MemoryError) or "out of memory" in str(error)


def describe(error: BaseException, place: Place, run_dir: Path) -> str:
    """Return the text of the report: what failed, on which rank, and how to fix it."""
    if isinstance(error, DistFtError):
        return f"dist-ft: {error.title} ({place})\n" + "\n".join(f"  {problem}" for problem in error.problems)
    lines = [
        f"dist-ft: {TrainingError.title} ({place})",
        f"  {type(error).__name__}: {str(error).strip() or 'no message'}",
        f"    → traceback and all output of this rank: {run_dir / 'logs' / f'rank-{place.rank}.log'}",
    ]
    if _is_out_of_memory(error):
        lines.append(
            "    → to reduce memory: lower train.per_device_train_batch_size or task.max_length, or set "
            "model.gradient_checkpointing=true, engine=fsdp or engine=zero3"
        )
    if frames := traceback.extract_tb(error.__traceback__):
        lines.append(f"    at {frames[-1].filename}:{frames[-1].lineno} in {frames[-1].name}")
    return "\n".join(lines)


def claim(
    run_dir: Path, place: Place, exit_code: int, text: str, kind: Kind = Kind.ERROR, cause: str | None = None
) -> bool:
    """Write failure.json if it does not exist yet; return whether this is the first failure of the run.

    Args:
        run_dir: Folder of the run.
        place: Place of this rank.
        exit_code: Exit code of the run.
        text: Report for the user.
        kind: What ended the run.
        cause: What stopped the run, by which a batch script decides whether to requeue it; None for a failure.
    """
    where = {"rank": place.rank, "host": place.host, "exit_code": exit_code, "time": time.time()}
    record = {**where, "kind": kind.value, "report": text}
    record |= {"cause": cause} if cause else {}
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        handle = os.open(run_dir / FAILURE_FILE, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    except OSError:  # disk full or not writable: several reports are better than none
        return True
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        json.dump(record, file)
    return True
