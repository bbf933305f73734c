"""Detection of a hanging rank, which is reported before the run is ended.

Collectives wait for the slowest rank, so if one rank hangs, all ranks appear to hang. On the other hand, ranks may wait
for a long time while rank 0 loads or exports a large model. A run is therefore considered to hang if no rank makes
progress: all ranks add their progress (a micro-batch, a tensor written) to one counter in the store. Each rank also
publishes a heartbeat with the stack of its main thread and monitors that of the next rank, so that a stopped process is
detected by a running one.

After `timeout_s` seconds without progress, the suspects are the ranks that no longer publish. If all ranks still
publish, they are those that have reached the fewest phases and are not inside a collective.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import Store

from ..errors import DistFtError, TrainingError
from . import failure
from .place import Place

FRAMES = 6
COLLECTIVES = "torch/distributed/"
FILES = "torch/distributed/checkpoint/filesystem.py"


class Watchdog:
    """Daemon thread that watches the progress of all ranks and the heartbeat of the next one.

    Args:
        place: Place of this rank.
        store: Separate connection to the store of the workers; a waiting call would block a shared connection.
        timeout_s: Seconds without progress of any rank after which the run is ended.
        run_dir: Run folder, to which the failure report is written.
        terminal: Stream to which the failure report is printed.
    """

    def __init__(self, place: Place, store: Store, timeout_s: float, run_dir: Path, terminal: TextIO) -> None:
        self.place = place
        self.store = store
        self.timeout_s = timeout_s
        self.run_dir = run_dir
        self.terminal = terminal
        self.main = threading.main_thread().ident
        self.interval_s = min(5.0, timeout_s / 4)
        self.pulses = 0
        self.count = 0  # of phases, which every rank reaches
        self.phase = "start"
        self.progress = 0  # of this rank, also inside a phase
        self._added = 0  # part of it that was added to the counter of all ranks
        self._total = 0  # progress of all ranks
        self._moved_at = self._heard_at = time.monotonic()
        self._heard: int | None = None  # last heartbeat of the next rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def beat(self, phase: str) -> None:
        """Record that the main thread has reached `phase`, as every rank does."""
        self.count += 1
        self.tick(phase)

    def tick(self, what: str) -> None:
        """Record progress inside a phase, such as a tensor written, which other ranks may not make."""
        self.phase = what
        self.progress += 1

    def close(self) -> None:
        """Stop watching, and publish that this rank is done."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        try:
            self._publish("runs")
            while not self._ended.wait(self.interval_s):
                self._publish("runs")
                self._look()
            self._publish("done")
        except RuntimeError:
            self._watch_alone()

    def _look(self) -> None:
        """End the run if no rank has made progress, or the next one has not published, for too long."""
        now = time.monotonic()
        if self._any_progress():
            self._moved_at = now
        pulse = self._read((self.place.rank + 1) % self.place.world_size)
        if pulse is None or pulse["state"] == "done" or pulse["pulse"] != self._heard:
            self._heard, self._heard_at = pulse["pulse"] if pulse else None, now
        if max(now - self._moved_at, now - self._heard_at) > self.timeout_s:
            self._give_up()

    def _any_progress(self) -> bool:
        """Add this rank's progress to that of all ranks; return whether any has made some since the last call."""
        own, before = self.progress, self._total
        self._total = self.store.add("progress", own - self._added)
        self._added = own
        return self._total != before

    def _watch_alone(self) -> None:
        """Watch only this rank, if the store on rank 0's host is gone; collectives may wait for it without an error."""
        seen, moved_at = self.progress, time.monotonic()
        while not self._ended.wait(self.interval_s):
            if self.progress != seen:
                seen, moved_at = self.progress, time.monotonic()
            if time.monotonic() - moved_at > self.timeout_s:
                rule = f"the store on the host of rank 0 does not answer, and {self.place} waits at {self.phase}"
                self._end(TrainingError.of("no contact with rank 0", rule, "check that host and the network"))

    def _publish(self, state: str) -> None:
        self.pulses += 1
        pulse = {
            "state": state,
            "pulse": self.pulses,
            "host": self.place.host,
            "count": self.count,
            "phase": self.phase,
            "stack": self._stack(),
        }
        self.store.set(f"pulse/{self.place.rank}", json.dumps(pulse))

    def _read(self, rank: int) -> dict[str, Any] | None:
        key = f"pulse/{rank}"
        if not self.store.check([key]):
            return None
        pulse: dict[str, Any] = json.loads(self.store.get(key))
        return pulse

    def _stack(self) -> list[str]:
        frame = sys._current_frames().get(self.main or 0)
        return [f"{f.filename}:{f.lineno} {f.name}" for f in traceback.extract_stack(frame)[-FRAMES:]]

    def _find_suspects(self) -> tuple[str, list[int]]:
        """Return a description of the problem and the ranks that the others wait for; none if there is progress."""
        before = self._read_running()
        for _ in range(2):  # the others do the same at the same time, and must still be seen to publish
            time.sleep(self.interval_s)
            self._publish("runs")
        pulses = self._read_running()
        silent = [rank for rank, pulse in pulses.items() if rank in before and pulse["pulse"] == before[rank]["pulse"]]
        if silent:
            return "no heartbeat", silent
        if self._any_progress():
            self._moved_at = time.monotonic()
            return "", []
        # A rank inside a collective waits for others; a rank with the same count outside of one is waited for.
        behind = [rank for rank, pulse in pulses.items() if pulse["count"] == min(p["count"] for p in pulses.values())]
        busy = [rank for rank in behind if not _is_waiting(pulses[rank]["stack"])]
        return "no progress", busy or behind

    def _read_running(self) -> dict[int, dict[str, Any]]:
        pulses = {rank: self._read(rank) for rank in range(self.place.world_size)}
        return {rank: pulse for rank, pulse in pulses.items() if pulse and pulse["state"] != "done"}

    def _give_up(self) -> None:
        what, suspects = self._find_suspects()
        if not suspects:
            return
        lines = []
        for rank in suspects[:8]:
            pulse = self._read(rank) or {"host": "unknown host", "phase": "start", "stack": []}
            lines.append(f"rank {rank} on {pulse['host']} at {pulse['phase']}; its main thread was last seen in")
            lines.extend(f"      {frame}" for frame in pulse["stack"])
        error = TrainingError.of(
            f"{what} for {self.timeout_s:g} s",
            "the other ranks are waiting for\n    " + "\n    ".join(lines),
            "check the log of that rank; increase train.timeout_s if a step can take this long",
        )
        self._end(error)

    def _end(self, error: DistFtError) -> None:
        code = failure.report(error, place=self.place, run_dir=self.run_dir, terminal=self.terminal)
        os._exit(code)  # the main thread is blocked in a collective and cannot be interrupted


def _is_waiting(stack: list[str]) -> bool:
    """Return whether a stack is inside a collective; torch.distributed code that writes checkpoints does not count."""
    return any(COLLECTIVES in frame for frame in stack) and not any(FILES in frame for frame in stack)
