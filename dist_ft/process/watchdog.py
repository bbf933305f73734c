"""Detection of a hanging rank, which is reported before the run is ended.

Collectives wait for the slowest rank, so if one rank hangs, all ranks appear to hang. Each rank counts its progress (a
micro-batch, a phase) and publishes the count with the stack of its main thread. Each rank also monitors the next rank,
so that a stopped process is noticed by a running one. After `timeout_s` seconds without progress, the suspects are the
ranks that no longer publish. If all ranks still publish, they are those with the smallest count that are not inside a
collective.
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

from ..errors import TrainingError
from . import failure
from .place import Place

FRAMES = 6
COLLECTIVES = "torch/distributed/"


class Watchdog:
    """Daemon thread that watches the progress of this rank and the heartbeat of the next one.

    Args:
        place: Place of this rank.
        store: Separate connection to the store of the workers; a waiting call would block a shared connection.
        timeout_s: Seconds without progress after which the run is ended.
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
        self.count = 0
        self.phase = "start"
        self.moved_at = time.monotonic()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self._thread.start()

    def beat(self, phase: str) -> None:
        """Record progress: the main thread has reached `phase`."""
        self.count += 1
        self.phase = phase
        self.moved_at = time.monotonic()

    def close(self) -> None:
        """Stop watching, and publish that this rank is done."""
        self._ended.set()
        self._thread.join(timeout=5)

    def _watch(self) -> None:
        neighbour = (self.place.rank + 1) % self.place.world_size
        seen: tuple[Any, float] = (None, time.monotonic())
        try:
            self._publish("runs")
            while not self._ended.wait(self.interval_s):
                self._publish("runs")
                pulse = self._read(neighbour)
                if pulse is None or pulse["state"] == "done" or pulse["pulse"] != seen[0]:
                    seen = (pulse and pulse["pulse"], time.monotonic())
                now = time.monotonic()
                if max(now - seen[1], now - self.moved_at) > self.timeout_s:
                    self._give_up()
            self._publish("done")
        except RuntimeError:  # the host of the store has ended, which the collectives report
            return

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
        """Return a description of the problem and the ranks that the others wait for."""
        before = self._read_running()
        time.sleep(2 * self.interval_s)
        self._publish("runs")
        pulses = self._read_running()
        silent = [rank for rank, pulse in pulses.items() if rank in before and pulse["pulse"] == before[rank]["pulse"]]
        if silent:
            return "no heartbeat", silent
        # A rank inside a collective waits for others; a rank with the same count outside of one is waited for.
        behind = [rank for rank, pulse in pulses.items() if pulse["count"] == min(p["count"] for p in pulses.values())]
        busy = [rank for rank in behind if not any(COLLECTIVES in frame for frame in pulses[rank]["stack"])]
        return "no progress", busy or behind

    def _read_running(self) -> dict[int, dict[str, Any]]:
        pulses = {rank: self._read(rank) for rank in range(self.place.world_size)}
        return {rank: pulse for rank, pulse in pulses.items() if pulse and pulse["state"] != "done"}

    def _give_up(self) -> None:
        what, suspects = self._find_suspects()
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
        code = failure.report(error, self.place, self.run_dir, self.terminal)
        os._exit(code)  # the main thread is blocked in a collective and cannot be interrupted
