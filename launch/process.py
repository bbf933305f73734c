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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config.plan import CHECKPOINTS, FAILURE_FILE, LOG_DIR, STOP_FILE, saved_steps
from ..errors import DistFtError, Problem, Stopped, TrainingError
from ..process.stop import REPEAT_S, accepted_signals
from .forward import stopped_before_workers
from .launcher import Rendered
from .machine.environ import child_environment

PASSED_ON = (0, 2, 3, 4, 75)
GRACE_S = 8.0  # from the first failure to SIGKILL, so that everything has ended within ten seconds
POLL_S = 0.1
MARK = "DIST_FT_LAUNCH"  # environment variable that identifies all processes of one launch
SHOW_CURSOR = "\033[?25h"
PR_SET_PDEATHSIG, PR_SET_CHILD_SUBREAPER = 1, 36


@dataclass
class Signals:
    """Signal handler that records the first stop signal, and whether there was a second one."""

    first: int | None = None
    again: bool = False
    at: float = 0.0

    def __call__(self, signum: int, _frame: Any) -> None:
        now = time.monotonic()
        if self.first is None:
            self.first, self.at = signum, now
        elif now - self.at >= REPEAT_S:
            self.again = True

    @property
    def name(self) -> str:
        """Name of the first signal."""
        return signal.Signals(self.first or 0).name


def run(
    rendered: Rendered,
    run_dir: Path,
    *,
    sweep: Callable[[], None] | None = None,
    by_file: bool = False,
    grace_s: float = GRACE_S,
    signals: Signals | None = None,
) -> int:
    """Run a rendered command and return the exit code of the run.

    A first signal is passed on, and the workers save a checkpoint and end; a second one ends everything at once.

    Args:
        rendered: Command to run; its files must already be written.
        run_dir: Folder of the run, where a failing worker writes `failure.json`.
        sweep: Ends processes on other hosts; called after a run that failed, was stopped or was killed.
        by_file: Whether workers are asked to stop by a file in the run's folder, because the command would kill them.
        grace_s: Seconds between a failure and SIGKILL.
        signals: Records the signals that this process receives; a new one if None.

    Returns:
        0 on success, the exit code of the first worker that failed, 75 if a signal stopped the run and it can go on
        without a loss, or 128 + N if it was stopped by signal N otherwise.
    """
    failure_file, stop_file = run_dir / FAILURE_FILE, run_dir / STOP_FILE
    failure_file.unlink(missing_ok=True)
    stop_file.unlink(missing_ok=True)
    mark = uuid.uuid4().hex
    _prctl(PR_SET_CHILD_SUBREAPER, 1)
    env = child_environment({**rendered.env, MARK: mark})
    signals = signals or Signals()

    def ask() -> None:
        print(f"dist-ft: {signals.name}: saving a checkpoint and stopping; a second signal ends the run at once")
        sys.stdout.flush()
        if by_file:
            stop_file.write_text(signals.name, encoding="utf-8")
        else:
            child.send_signal(signals.first or signal.SIGTERM)

    with handled(signals):
        child = subprocess.Popen(list(rendered.command), env=env, preexec_fn=_leash(os.getpid()))  # noqa: PLW1509 – no threads here
        forced = _wait(child, signals, ask, failure_file, grace_s, by_file)
    _end_all(mark)
    _prctl(PR_SET_CHILD_SUBREAPER, 0)
    if sweep is not None and (forced or signals.first or child.returncode):
        sweep()
    if child.returncode and sys.stderr.isatty():
        sys.stderr.write(SHOW_CURSOR)  # a progress bar hides it
    if signals.first is None or child.returncode == 0 or (failure_file.exists() and not signals.again):
        return exit_code(child.returncode, failure_file, run_dir)
    if child.returncode == -signals.first:  # it had no handler yet
        print(stopped_before_workers(signals.first), file=sys.stderr, flush=True)
    elif child.returncode != Stopped.exit_code or signals.again:
        show_error(TrainingError(_lost(signals, run_dir)))
        return 128 + signals.first
    return Stopped.exit_code


def _lost(signals: Signals, run_dir: Path) -> Problem:
    newest = next(iter(saved_steps(run_dir / CHECKPOINTS)), None)
    since = f"step {newest.name.removeprefix('step-')}, the last checkpoint," if newest else "the start"
    how = "a second signal ended the run at once" if signals.again else "the run ended without saving"
    return Problem(signals.name, f"{how}: what was trained since {since} is lost", "run the same command again")


def run_module(words: list[str]) -> int:
    """Run `python -m WORDS` and return its exit code, 128 + N if it was ended by signal N.

    From a terminal, it is in the foreground process group, so that it can read the terminal, which then sends Ctrl-C to
    it as well. All other signals are passed on.
    """
    apart = not os.isatty(0)
    child = start_module(words, own_group=apart)
    signals, sent = Signals(), False
    with handled(signals):
        while (status := child.poll()) is None:
            if signals.first is not None and not sent and (apart or signals.first != signal.SIGINT):
                child.send_signal(signals.first)
                sent = True
            if signals.again:
                child.kill()
            time.sleep(POLL_S / 5)
    return status if status >= 0 else 128 - status


def start_module(
    words: Sequence[str],
    *,
    own_group: bool = True,
    environment: Mapping[str, str] | None = None,
    output: Path | None = None,
) -> subprocess.Popen[bytes]:
    """Start `python -m WORDS`, which ends with this process.

    Args:
        words: Module and its arguments.
        own_group: Whether it is in a process group of its own, so that a terminal sends it no signals.
        environment: Variables to add to those of this process.
        output: File to which it writes instead of the terminal; it then reads no input.
    """
    with contextlib.ExitStack() as closing:
        file = closing.enter_context(output.open("ab")) if output else None
        return subprocess.Popen(
            [sys.executable, "-m", *words],
            env=None if environment is None else child_environment(environment),
            preexec_fn=_leash(os.getpid(), own_group=own_group),  # noqa: PLW1509 – no threads here
            stdin=subprocess.DEVNULL if file else None,
            stdout=file,
            stderr=subprocess.STDOUT if file else None,
        )


def exit_code(status: int, failure_file: Path, run_dir: Path) -> int:
    """Return the exit code of a run whose launcher ended with `status`, and print an error if no worker reported one.

    Launchers replace the exit code of a worker by 1, or by that of the signal with which they killed the other
    workers. The code in `failure.json` therefore takes precedence.
    """
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):  # also of a worker that left with code 0
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


def _wait(
    child: subprocess.Popen[bytes],
    signals: Signals,
    ask: Callable[[], None],
    failure_file: Path,
    grace_s: float,
    by_file: bool,
) -> bool:
    """Wait for the launcher to exit; terminate it after a failure. Return whether it was killed.

    A second signal kills it at once, or terminates it if it has to end workers on other hosts (`by_file`). There is no
    time limit for the checkpoint after a first signal: workers that hang end by themselves.
    """
    deadline: float | None = None
    asked = terminated = False
    while child.poll() is None:
        if signals.first is not None and not asked:
            asked = True
            with contextlib.suppress(ProcessLookupError):
                ask()
        if (failure_file.exists() or signals.again) and deadline is None:
            deadline = time.monotonic() + (grace_s if by_file or not signals.again else 0)
        # After a failure, give the launcher a quarter of the grace period to end its workers itself.
        late = deadline is not None and time.monotonic() > deadline - 0.75 * grace_s
        if not terminated and (late or (by_file and signals.again)):
            terminated = True
            with contextlib.suppress(ProcessLookupError):
                child.terminate()
        if deadline is not None and time.monotonic() > deadline:
            with contextlib.suppress(ProcessLookupError):
                child.kill()
            child.wait()  # before `_end_all`, which would take its exit status
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
def nothing_started() -> Iterator[None]:
    """End this process with code 75 at a signal, until `run` or `run_module` receive the signals."""

    def leave(signum: int, _frame: Any) -> None:
        print(stopped_before_workers(signum), file=sys.stderr, flush=True)
        os._exit(Stopped.exit_code)

    with handled(leave):
        yield


@contextlib.contextmanager
def handled(handler: Callable[[int, Any], None]) -> Iterator[None]:
    """Receive the signals that stop a run by `handler` in the body."""
    before = {number: signal.signal(number, handler) for number in accepted_signals()}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


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
