"""Detection of a hanging rank, which is reported before the run is ended.

Collectives wait for the slowest rank, so if one rank hangs, all ranks appear to hang. On the other hand, ranks may wait
for a long time while rank 0 loads or exports a large model. A run is therefore considered to hang if no rank makes
progress: all ranks add their progress (a micro-batch, a tensor written) to one counter in the store. Each rank also
publishes a heartbeat with the stack of its main thread and monitors that of the next rank, so that a stopped process is
detected by a running one.

After `timeout_s` seconds without progress, the suspects are the ranks that no longer publish. If all ranks still
publish, they are those that have reached the fewest phases and are not inside a collective. They are named within 5 s.

A rank that was stopped is usually named by its own monitor first (monitor.py), which needs no store.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TextIO

from torch.distributed import Store

from ..errors import DistFtError, TrainingError
from . import failure
from .monitor import interval
from .place import Place
from .pulse import Pulse, is_waiting

MOST_NAMED = 8
LOOKS = 3  # intervals within which a rank that runs publishes


class Watchdog:
    """Daemon thread that watches the progress of all ranks and the heartbeat of the next one.

    Args:
        place: Place of this rank.
        pulse: What this rank is doing.
        store: Separate connection to the store of the workers; a waiting call would block a shared connection.
        timeout_s: Seconds without progress of any rank after which the run is ended.
        run_dir: Run folder, to which the failure report is written.
        terminal: Stream to which the failure report is printed.
    """

    def __init__(
        self, place: Place, pulse: Pulse, store: Store, timeout_s: float, run_dir: Path, terminal: TextIO
    ) -> None:
        self.place = place
        self.pulse = pulse
        self.store = store
        self.timeout_s = timeout_s
        self.run_dir = run_dir
        self.terminal = terminal
        self.interval_s = interval(timeout_s)
        self.published = 0
        self._added = 0  # part of this rank's progress that was added to the counter of all ranks
        self._total = 0  # progress of all ranks
        self._moved_at = self._own_moved_at = self._heard_at = self._looked_at = time.monotonic()
        self._heard: int | None = None  # last heartbeat of the next rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def start(self) -> None:
        """Start watching."""
        self.pulse.shared = True
        self._thread.start()

    def close(self) -> None:
        """Stop watching, and publish that this rank is done."""
        self._ended.set()
        self._thread.join(timeout=5)
        self.pulse.shared = False

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
        if now - self._looked_at > max(self.timeout_s / 2, 3 * self.interval_s):  # the whole job was stopped for a time
            self._moved_at = self._heard_at = now
        self._looked_at = now
        if self._any_progress():
            self._moved_at = now
        state, number = self._next_pulse()
        if state != "runs" or number != self._heard:
            self._heard, self._heard_at = number, now
        if max(now - self._moved_at, now - self._heard_at) > self.timeout_s:
            self._give_up()

    def _next_pulse(self) -> tuple[str, int | None]:
        """Return what the next rank has published last: its state and the number of its heartbeat."""
        pulse = self._read([(self.place.rank + 1) % self.place.world_size])
        return next(((p["state"], p["pulse"]) for p in pulse.values()), ("unknown", None))

    def _any_progress(self) -> bool:
        """Add this rank's progress to that of all ranks; return whether any has made some since the last call."""
        own, before = self.pulse.progress, self._total
        self._total = self.store.add("progress", own - self._added)
        if own != self._added:
            self._added, self._own_moved_at = own, time.monotonic()
        return self._total != before

    def _watch_alone(self) -> None:
        """Watch only this rank, if the store on rank 0's host is gone; collectives may wait for it without an error.

        The store has not answered for `timeout_s` then, so a rank that has waited since does not wait once more.
        """
        seen, moved_at = self._added, self._own_moved_at
        while not self._ended.wait(self.interval_s):
            if self.pulse.progress != seen:
                seen, moved_at = self.pulse.progress, time.monotonic()
            if time.monotonic() - moved_at > self.timeout_s:
                rule = f"the store on the host of rank 0 does not answer, and {self.place} waits at {self.pulse.phase}"
                error = TrainingError.of("no contact with rank 0", rule, "check that host and the network")
                self._end(error, self.place, failure.OTHERS_S)

    def _publish(self, state: str) -> None:
        self.published += 1
        pulse = {
            "state": state,
            "pulse": self.published,
            "host": self.place.host,
            "count": self.pulse.count,
            "phase": self.pulse.phase,
            "stack": self.pulse.stack(),
        }
        self.store.set(f"pulse/{self.place.rank}", json.dumps(pulse))

    def _read(self, ranks: Sequence[int]) -> dict[int, dict[str, Any]]:
        """Return what those of `ranks` have published last that have begun to publish."""
        begun = [rank for rank in ranks if self.store.check([f"pulse/{rank}"])]
        texts = self.store.multi_get([f"pulse/{rank}" for rank in begun]) if begun else []
        return {rank: json.loads(text) for rank, text in zip(begun, texts, strict=True)}

    def _read_running(self) -> dict[int, dict[str, Any]]:
        pulses = self._read(range(self.place.world_size))
        return {rank: pulse for rank, pulse in pulses.items() if pulse["state"] != "done"}

    def _find_suspects(self) -> tuple[str, dict[int, dict[str, Any]]]:
        """Return a description of the problem and what the ranks do that others wait for; none if there is progress."""
        before = pulses = self._read_running()
        silent = list(pulses)
        for _ in range(LOOKS):  # the others do the same at the same time, and must still be seen to publish
            time.sleep(self.interval_s)
            self._publish("runs")
            pulses = self._read_running()
            silent = [rank for rank in silent if rank in pulses and pulses[rank]["pulse"] == before[rank]["pulse"]]
            if not silent:
                break
        if silent:
            return "no heartbeat", {rank: pulses[rank] for rank in silent}
        if self._any_progress():
            self._moved_at = time.monotonic()
            return "", {}
        # A rank inside a collective waits for others; a rank with the same count outside of one is waited for.
        least = min(pulse["count"] for pulse in pulses.values())
        behind = {rank: pulse for rank, pulse in pulses.items() if pulse["count"] == least}
        busy = {rank: pulse for rank, pulse in behind.items() if not is_waiting(pulse["stack"])}
        return "no progress", busy or behind

    def _give_up(self) -> None:
        what, suspects = self._find_suspects()
        if not suspects:
            return
        lines = []
        for rank, pulse in list(suspects.items())[:MOST_NAMED]:
            lines.append(f"rank {rank} on {pulse['host']} at {pulse['phase']}; its main thread was last seen in")
            lines.extend(f"      {frame}" for frame in pulse["stack"])
        error = TrainingError.of(
            f"{what} for {self.timeout_s:g} s",
            "the other ranks are waiting for\n    " + "\n    ".join(lines),
            "check the log of that rank; increase train.timeout_s if a step can take this long",
        )
        first, pulse = next(iter(suspects.items()))
        self._end(error, Place(first, self.place.world_size, host=pulse["host"]))

    def _end(self, error: DistFtError, place: Place, patience_s: float = 0.0) -> None:
        """Report an error of the rank at `place` and end this process."""
        code = failure.report(
            error,
            place=place,
            run_dir=self.run_dir,
            terminal=self.terminal,
            kind=failure.Kind.HUNG,
            patience_s=patience_s,
        )
        os._exit(code)  # the main thread is blocked in a collective and cannot be interrupted
