"""What a worker is doing, and the heartbeat that tells its monitor (monitor.py).

Imports no torch: a worker is monitored before it imports anything slow.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import sys
import threading
import time
from dataclasses import asdict
from pathlib import Path

from . import monitor

FRAMES = 6
BUSY = 0.01  # share of a CPU above which a process works; one that hangs uses less for its threads
FILES = "torch/distributed/checkpoint/filesystem.py"
IMPORTS = "<frozen importlib"
WAITS = ("torch/distributed/", "dist_ft/process/comm.py")


class Pulse:
    """The phase that the main thread of this worker has reached, its stack, and a monitor that is told of both.

    Attributes:
        count: Number of phases, which every rank reaches.
        phase: Last phase, or what was done in it last.
        progress: Number of phases and of ticks inside them.
        shared: Whether the ranks watch each other (watchdog.py), so that the monitor need not judge whether this rank
            makes progress.
        launcher: Process id of the parent of this process.
    """

    def __init__(self) -> None:
        self.count = 0
        self.phase = "start"
        self.progress = 0
        self.shared = False
        self.launcher = os.getppid()
        self._main = threading.main_thread().ident
        self._pipe: int | None = None  # to the monitor
        self._board = mmap.mmap(-1, monitor.BOARD_BYTES)  # shared with the monitor
        self._switches: int | None = None
        self._cpu_s = 0.0

    def beat(self, phase: str) -> None:
        """Record that the main thread has reached `phase`, as every rank does."""
        self.count += 1
        self.tick(phase)

    def tick(self, what: str) -> None:
        """Record progress inside a phase, such as a tensor written, which other ranks may not make."""
        self.phase = what
        self.progress += 1
        monitor.write(self._board, what)

    def stack(self) -> list[str]:
        """Return the innermost frames of the main thread."""
        frame = sys._current_frames().get(self._main or 0)
        frames: list[str] = []
        while frame is not None and len(frames) < FRAMES:  # traceback would read the files, which may be what hangs
            frames.append(f"{frame.f_code.co_filename}:{frame.f_lineno} {frame.f_code.co_name}")
            frame = frame.f_back
        return frames[::-1]

    def _imports(self) -> bool:
        """Return whether the main thread imports a module."""
        frame = sys._current_frames().get(self._main or 0)
        while frame is not None and not frame.f_code.co_filename.startswith(IMPORTS):
            frame = frame.f_back
        return frame is not None

    def fork_monitor(self) -> None:
        """Start the monitor. It is forked, which takes no time, and therefore before this process has other threads."""
        heard, self._pipe = os.pipe()
        worker = os.getpid()
        if os.fork() == 0:
            os.close(self._pipe)
            monitor.main(heard, worker, self._board, self.launcher)
        os.close(heard)
        os.set_blocking(self._pipe, False)

    def start(self, about: monitor.About) -> None:
        """Begin to tell the monitor, if there is one, which names this rank from now on if it dies, stops or hangs."""
        if self._pipe is None:
            return
        self._tell(asdict(about))
        threading.Thread(target=self._beat_on, args=(about.interval_s,), name="pulse", daemon=True).start()

    def leave(self) -> None:
        """Tell the monitor that this worker ends as it should."""
        if self._pipe is not None:
            self._tell({"left": True})

    def _beat_on(self, interval_s: float) -> None:
        moves = 0
        while True:
            stack = self.stack()
            moved = self._has_moved(interval_s)
            if not self.shared:
                moves += moved or is_waiting(stack)
            elif moved and self._imports():  # for minutes from a busy file system, without a tick
                self.progress += 1
            progress = self.progress + moves
            self._tell({"progress": progress, "stack": stack, "shared": self.shared})
            time.sleep(interval_s)

    def _has_moved(self, interval_s: float) -> bool:
        """Return whether the main thread has run since the last call, or another thread has used a CPU.

        A main thread that waits for a file system or sleeps for hours does neither.
        """
        switches, cpu_s = count_switches(), time.process_time() - time.thread_time()
        moved = switches is None or switches != self._switches or cpu_s - self._cpu_s > BUSY * interval_s
        self._switches, self._cpu_s = switches, cpu_s
        return moved

    def _tell(self, what: dict[str, object]) -> None:
        with contextlib.suppress(OSError):  # the monitor is gone, or was stopped and its pipe is full
            os.write(self._pipe or 0, json.dumps(what).encode() + b"\n")


def is_waiting(stack: list[str]) -> bool:
    """Return whether a stack waits for other ranks.

    Code of torch.distributed that writes checkpoints does not, nor does the import of such code.
    """
    waits = any(place in frame for frame in stack for place in WAITS)
    return waits and not any(place in frame for frame in stack for place in (FILES, IMPORTS))


def count_switches() -> int | None:
    """Return how often the main thread of this process gave up its CPU to wait; None if the system does not tell."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("voluntary_ctxt_switches"):
                return int(line.split()[1])
    return None
