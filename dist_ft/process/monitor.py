"""A process beside each worker that reports when the worker dies, is stopped, or hangs before ranks watch each other.

A worker that was stopped (SIGSTOP), or whose main thread never releases Python's lock, cannot report itself; if it is
rank 0, the store that all ranks share may stop with it. A worker that was killed or crashed in C code is missed by its
neighbours first, whose "connection reset" names nobody. The monitor is a child of the worker, reads its heartbeats from
a pipe, and is alike under every launcher.

Imports only the standard library until it reports.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import select
import signal
import struct
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ..config.plan import Plan
    from .place import Place

MOST_INTERVAL_S = 1.0  # between two heartbeats
JUDGED_BY_OTHERS_S = 0.3  # after a death: who kills a whole run kills the monitor too, within this time
TOLD = (2, 3, 4, 75)  # exit codes of workers that have reported why they end
BEGIN_S = 3.0  # after which a worker that has not told about itself is judged, too
BOARD_BYTES = 4096
FATAL = "Fatal Python error: "  # of faulthandler
PIDFD_GET_INFO, PIDFD_INFO_EXIT = 0xC040FF0B, 1 << 3  # linux/pidfd.h, since Linux 6.15
PIDFD_INFO = "QQ11Ii"  # struct pidfd_info: mask, cgroup, ids, exit code


@dataclass(frozen=True)
class About:
    """What a monitor has to know about its worker."""

    rank: int
    world_size: int
    host: str
    run_dir: str
    timeout_s: float
    launcher: int  # process id

    @classmethod
    def of(cls, plan: Plan, place: Place, launcher: int) -> About:
        """Describe the worker at `place`, whose parent is process `launcher`."""
        run_dir, timeout_s = str(plan.run_dir), plan.config.train.timeout_s
        return cls(place.rank, place.world_size, place.host, run_dir, timeout_s, launcher)

    @property
    def interval_s(self) -> float:
        """Seconds between two heartbeats."""
        return interval(self.timeout_s)


def interval(timeout_s: float) -> float:
    """Return the seconds between two heartbeats: few enough to name a rank within 5 s after `timeout_s`."""
    return min(MOST_INTERVAL_S, timeout_s / 8)


def write(board: mmap.mmap, phase: str) -> None:
    """Write what a worker does on its board."""
    text = phase.encode()[: BOARD_BYTES - 1] + b"\0"
    board[: len(text)] = text


def read(board: mmap.mmap) -> str:
    """Return what a worker did last."""
    return board[:].partition(b"\0")[0].decode(errors="replace") or "start"


def main(pipe: int, worker: int, board: mmap.mmap, launcher: int) -> None:
    """Monitor process `worker`, see `Monitor`, and end this process after it."""
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)  # they stop the worker, and the monitor ends with it
    try:
        Monitor(pipe, worker, board, partial(find_about, launcher)).run()
    finally:
        os._exit(0)


def find_about(launcher: int) -> About:
    """Find out about the worker that this process was forked from, by its arguments and environment."""
    from ..config.plan import read_plan
    from .place import find_place

    return About.of(read_plan(sys.argv[1]), find_place(), launcher)


class Monitor:
    """Judges one worker by its heartbeats.

    Args:
        pipe: File descriptor that ends with the worker.
        worker: Its process id.
        board: Memory in which it says what it does.
        find: Finds out about a worker that ends or stops before it has told it.
    """

    def __init__(self, pipe: int, worker: int, board: mmap.mmap, find: Callable[[], About]) -> None:
        self.pipe, self.worker, self.board, self.find = pipe, worker, board, find
        self.about: About | None = None
        self.pulse: dict[str, Any] = {"progress": 0, "stack": [], "shared": False}
        self.has_left = False
        self._handle = _open_process(worker)
        self._rest = b""
        self._heard_at = self._moved_at = self._looked_at = time.monotonic()

    def run(self) -> None:
        """Return once the worker has ended, or was reported and killed."""
        waits = [self.pipe] if self._handle is None else [self.pipe, self._handle]
        while not self.has_left:
            ready, _, _ = select.select(waits, [], [], self.about.interval_s if self.about else MOST_INTERVAL_S)
            if self.pipe in ready and not self._read():
                break
            if ready == [self._handle]:  # a child of the worker may hold the other end of the pipe
                break
            if self.about is None and time.monotonic() - self._heard_at > BEGIN_S:
                self._find_about()
            if self.about is not None and self._judge(self.about):
                return
        if not self.has_left:
            self._report_death()

    def _find_about(self) -> None:
        self.about = self.find()
        self._heard_at = self._moved_at = time.monotonic()

    def _read(self) -> bool:
        """Take in what the worker has told; return False at its end."""
        text = os.read(self.pipe, 1 << 16)
        *lines, self._rest = (self._rest + text).split(b"\n")
        for line in lines:
            self._hear(json.loads(line))
        return bool(text)

    def _hear(self, told: dict[str, Any]) -> None:
        now = self._heard_at = time.monotonic()
        if "left" in told:
            self.has_left = True
        elif "rank" in told:
            self.about, self._moved_at = About(**told), now
        else:
            if told["progress"] != self.pulse["progress"] or told["shared"]:
                self._moved_at = now
            self.pulse = told

    def _judge(self, about: About) -> bool:
        """Report a worker without heartbeat or progress for too long and kill it; return whether this was done."""
        now = time.monotonic()
        if now - self._looked_at > 3 * about.interval_s + 1:  # this process was stopped too, with the whole job
            self._heard_at = self._moved_at = now
        self._looked_at = now
        if now - self._heard_at > about.timeout_s:
            what = "no heartbeat"
        elif now - self._moved_at > about.timeout_s:
            what = "no progress"
        else:
            return False
        rule = f"rank {about.rank} on {about.host} at {read(self.board)}" + self._last_seen()
        way_out = "check the log of that rank; increase train.timeout_s if this can take so long"
        _report(about, "HUNG", f"{what} for {about.timeout_s:g} s", rule, way_out)
        with contextlib.suppress(ProcessLookupError):
            os.kill(self.worker, signal.SIGKILL)  # a stopped process handles no other signal
        return True

    def _report_death(self) -> None:
        code = _exit_code(self.worker, self._handle)
        if code in TOLD:
            return
        time.sleep(JUDGED_BY_OTHERS_S)
        about = self.about or self.find()
        if not _runs(about.launcher):  # it ended with its launcher, see lifeline.py
            return
        log = Path(about.run_dir) / "logs" / f"rank-{about.rank}.log"
        crash = read_crash(log)
        frames = "".join(f"\n      {line}" for line in crash) or self._last_seen()
        way_out = f"see {log}"
        if code == -signal.SIGKILL:
            way_out = f"check memory use and dmesg: the kernel kills processes when memory runs out; {way_out}"
        rule = f"{describe_end(code)} at {read(self.board)}, without a report" + frames
        _report(about, "DIED", f"rank {about.rank} on {about.host}", rule, way_out)

    def _last_seen(self) -> str:
        lines = [f"\n      {frame}" for frame in self.pulse["stack"]]
        return "; its main thread was last seen in" + "".join(lines) if lines else ""


def describe_end(code: int | None) -> str:
    """Return how a process has ended: exit code, negative for a signal, or None if it is not known."""
    if code is None:
        return "was killed or left"
    if code >= 0:
        return f"left with exit code {code}"
    name = signal.Signals(-code).name if -code in set(signal.Signals) else f"signal {-code}"
    return f"was killed by {name}"


def read_crash(log: Path) -> list[str]:
    """Return what faulthandler wrote at the end of a log: the error, and the frames of the thread that crashed."""
    try:
        with log.open("rb") as file:
            file.seek(max(0, log.stat().st_size - (1 << 16)))
            text = file.read().decode(errors="replace")
    except OSError:
        return []
    _, found, rest = text.rpartition(FATAL)
    if not found:
        return []
    first, *lines = rest.splitlines()
    start = next((i for i, line in enumerate(lines) if line.startswith("Current thread")), len(lines))
    frames = []
    for line in lines[start + 1 : start + 7]:
        if not line.startswith("  File "):
            break
        frames.append(line.strip())
    return [FATAL + first, *frames]


def _report(about: About, kind: str, where: str, rule: str, way_out: str) -> None:
    # Loaded only now, so that a monitor needs little memory.
    from ..errors import TrainingError
    from . import failure
    from .place import Place

    place = Place(about.rank, about.world_size, host=about.host)
    run_dir, error = Path(about.run_dir), TrainingError.of(where, rule, way_out)
    text = failure.describe(error, place, run_dir)
    if failure.claim(run_dir, place, error.exit_code, text, failure.Kind[kind]):
        os.write(2, f"{text}\n".encode())  # in UTF-8, as workers do, whatever the locale is


def _open_process(process: int) -> int | None:
    """Return a descriptor that is readable once `process` has ended; None if the system has none."""
    with contextlib.suppress(OSError, AttributeError):
        return os.pidfd_open(process)
    return None


def _exit_code(process: int, handle: int | None) -> int | None:
    """Return the exit code of a process that has just ended, negative for a signal; None if it cannot be found.

    /proc shows it until the parent has taken it, and newer versions of Linux afterwards by the handle.
    """
    for _ in range(20):
        with contextlib.suppress(OSError, ValueError, IndexError):
            state, *fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
            if state in "ZX":
                return os.waitstatus_to_exitcode(int(fields[48]))
        with contextlib.suppress(OSError, ValueError):
            info = bytearray(struct.pack(PIDFD_INFO, PIDFD_INFO_EXIT, *[0] * 13))
            fcntl.ioctl(-1 if handle is None else handle, PIDFD_GET_INFO, info)
            mask, *_, status = struct.unpack(PIDFD_INFO, info)
            if mask & PIDFD_INFO_EXIT:
                return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    return None


def _runs(process: int) -> bool:
    with contextlib.suppress(OSError, IndexError):
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)
    return True
