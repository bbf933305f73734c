"""Run a rendered command in the foreground, leave no process behind, and return the exit code of the run.

torchrun starts each worker in a session of its own, so that killing a process group does not reach them. This process
therefore becomes their subreaper (prctl(2), PR_SET_CHILD_SUBREAPER): orphaned descendants become its children and can
be found.
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import DistFtError, Problem, Stopped, TrainingError
from .launcher import FAILURE_FILE, LOG_DIR, Rendered
from .machine.environ import child_environment

PASSED_ON = (0, 2, 3, 4, 75)
GRACE_S = 8.0  # from the first failure or stop request to SIGKILL, so that everything has ended within ten seconds
POLL_S = 0.1
MARK = "DIST_FT_LAUNCH"  # environment variable that identifies all processes of one launch
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Stop:
    """Signal handler that records the last stop signal, and whether there was more than one."""

    signum: int | None = None
    again: bool = False

    def __call__(self, signum: int, _frame: Any) -> None:
        self.again = self.signum is not None
        self.signum = signum


def run(rendered: Rendered, run_dir: Path, *, sweep: Callable[[], None] | None = None, grace_s: float = GRACE_S) -> int:
    """Run a rendered command and return the exit code of the run.

    Args:
        rendered: Command to run; its files must already be written.
        run_dir: Folder of the run, where a failing worker writes `failure.json`.
        sweep: Ends processes on other hosts; called after a run that failed, was stopped or was killed.
        grace_s: Seconds between SIGTERM and SIGKILL.

    Returns:
        0 on success, the exit code of the first worker that failed, or 128 + N if signal N stopped the run before it
        could write a checkpoint.
    """
    failure_file = run_dir / FAILURE_FILE
    failure_file.unlink(missing_ok=True)
    mark = uuid.uuid4().hex
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    env = child_environment({**rendered.env, MARK: mark})
    stop = Stop()
    with _handlers(stop):
        child = subprocess.Popen(list(rendered.command), env=env, preexec_fn=_leash(os.getpid()))  # noqa: PLW1509 – no threads here
        forced = _wait(child, stop, failure_file, mark, grace_s)
    _end_all(mark)
    _prctl(PR_SET_CHILD_SUBREAPER, 0)
    if sweep is not None and (forced or stop.signum or child.returncode):
        sweep()
    if stop.signum is not None and child.returncode != Stopped.exit_code:
        return 128 + stop.signum
    return exit_code(child.returncode, failure_file, run_dir)


def run_module(words: list[str]) -> int:
    """Run `python -m WORDS` in the foreground process group, so that it can read the terminal; return its exit code."""
    command = [sys.executable, "-m", *words]
    child = subprocess.Popen(command, preexec_fn=_leash(os.getpid(), own_group=False))  # noqa: PLW1509
    with _handlers(Stop()):  # the terminal sends Ctrl-C to the child too, so this process only waits for it
        status = child.wait()
    return status if status >= 0 else 128 - status


def exit_code(status: int, failure_file: Path, run_dir: Path) -> int:
    """Return the exit code of a run whose launcher ended with `status`, and print an error if no worker reported one.

    Launchers replace the exit code of a worker by 1, or by that of the signal with which they killed the other
    workers. The code in `failure.json` therefore takes precedence.
    """
    if status == 0:
        return 0
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
        return int(json.loads(failure_file.read_text(encoding="utf-8"))["exit_code"])
    if status in PASSED_ON:
        return status
    logs = f"see {run_dir / LOG_DIR}"
    signum = -status if status < 0 else status - 128 if 128 < status < 128 + 65 else 256 - status
    if status in (137, 247, -9):
        report = Problem(
            "workers", "a worker was killed (SIGKILL) without a report", f"check memory use, {logs} and dmesg"
        )
    elif status < 0 or status > 128:
        report = Problem("workers", f"a worker was killed by signal {signum} without writing a report", logs)
    else:
        report = Problem("launcher", f"exited with code {status}, and no worker wrote a report", logs)
    show_error(TrainingError(report))
    return TrainingError.exit_code


def show_error(error: DistFtError) -> None:
    """Print the problems of an error to stderr."""
    print(f"dist-ft: {error.title}", file=sys.stderr)
    for problem in error.problems:
        print(f"  {problem}", file=sys.stderr)
    sys.stderr.flush()


def _wait(child: subprocess.Popen[bytes], stop: Stop, failure_file: Path, mark: str, grace_s: float) -> bool:
    """Wait for the launcher to exit; terminate it after a failure or a stop signal. Return whether it was killed."""
    deadline: float | None = None
    asked = False
    while child.poll() is None:
        failed = failure_file.exists()
        if (failed or stop.signum is not None) and deadline is None:
            deadline = time.monotonic() + grace_s
        # After a failure, give the launcher a quarter of the grace period to end its workers itself.
        late = deadline is not None and time.monotonic() > deadline - 0.75 * grace_s
        if not asked and (stop.signum is not None or late):
            asked = True
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        if deadline is not None and (stop.again or time.monotonic() > deadline):
            _end_all(mark)
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()
            return True
        time.sleep(POLL_S)
    return False


def _leash(parent: int, *, own_group: bool = True) -> Callable[[], None]:
    """Return a preexec function: own process group, and SIGTERM when this process dies, even by SIGKILL."""

    def attach() -> None:
        if own_group:
            os.setpgid(0, 0)
        signal.pthread_sigmask(signal.SIG_SETMASK, [])
        _prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # the parent died before PR_SET_PDEATHSIG took effect
            os._exit(1)

    return attach


@contextlib.contextmanager
def _handlers(stop: Stop) -> Iterator[None]:
    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _end_all(mark: str) -> None:
    """Kill all descendants of this process that carry the mark of a launch, until none is left."""
    for _ in range(50):
        left = marked_descendants(mark)
        for pid in left:
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, signal.SIGKILL)
        for pid in left:
            with contextlib.suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
        if not left:
            return
        time.sleep(0.05)


def marked_descendants(mark: str) -> list[int]:
    """Return the ids of running descendants of this process whose environment has the mark of the launch."""
    parents = _parents()
    own = os.getpid()
    word = f"{MARK}={mark}".encode()
    found = []
    for pid in parents:
        above = parents.get(pid)
        while above is not None and above not in (own, 0):
            above = parents.get(above)
        if above == own:
            with contextlib.suppress(OSError):
                if word in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                    found.append(pid)
    return found


def _parents() -> dict[int, int]:
    """Return process id → parent's id for all running processes except zombies; empty without /proc."""
    found = {}
    for entry in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, parent = entry.read_text().rpartition(")")[2].split()[:2]
            if state not in "ZX":
                found[int(entry.parent.name)] = int(parent)
    return found


# Loaded here because a child must not load libraries between fork and exec.
_LIBC = ctypes.CDLL(None, use_errno=True) if sys.platform == "linux" else None


def _prctl(option: int, value: int) -> None:
    if _LIBC is not None:
        _LIBC.prctl(option, value, 0, 0, 0)
