"""Requests to stop a run: signals, the stop file of the launcher, and the time limit of the job.

A request is heard by a thread, because Python runs signal handlers in the main thread only, which may wait in a
collective or load a library. While a run trains, a request is recorded, and the ranks agree on it in the reduction of
the next step (loop.py). Before and afterwards nothing can be lost, and the process ends at once.

Imports no torch: a worker listens before it imports anything slow.
"""

from __future__ import annotations

import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable

from ..errors import Problem, Stopped

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)
REPEAT_S = 0.5  # a terminal, `timeout` and launchers deliver one request to the same process several times
POLL_S = 1.0
AGAIN = "run the same command again to go on"
WITH_AUTO = "run the same command with train.resume=auto to go on"
BEFORE = "no step was trained since this start, so nothing is lost"


def accepted_signals() -> list[signal.Signals]:
    """Return the signals that stop a run, without those that are ignored, such as SIGHUP under nohup."""
    return [number for number in SIGNALS if signal.getsignal(number) is not signal.SIG_IGN]


def stop_signal(code: int) -> str | None:
    """Return the name of the signal that ended a process with exit code 128 + N, if it is one that stops a run."""
    return next((number.name for number in SIGNALS if code == 128 + number), None)


class Stop:
    """The requests that this process has received.

    Attributes:
        cause: What the first request was, such as `SIGTERM`; None without a request.
    """

    def __init__(self) -> None:
        self.cause: str | None = None
        self._again = AGAIN
        self._rule = BEFORE
        self._holds = False
        self._first_at: float | None = None  # of a signal
        self._poll: Callable[[], str | None] = lambda: None
        self._tell: Callable[[Stopped, int], object] = _print

    def listen(self) -> None:
        """Receive the signals from now on; call this in the main thread."""
        heard, woken = os.pipe()
        os.set_blocking(woken, False)
        signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
        accepted = accepted_signals()
        for number in accepted:
            signal.signal(number, lambda *_: None)  # the thread reads the number from the pipe
            signal.siginterrupt(number, False)
        threading.Thread(target=self._hear, args=(heard,), name="stop", daemon=True).start()
        signal.pthread_sigmask(signal.SIG_UNBLOCK, accepted)  # launchers block them until here, see launch/forward.py

    def attach(self, tell: Callable[[Stopped, int], object], poll: Callable[[], str | None]) -> None:
        """Set how this process reports why it ends.

        Args:
            tell: Reports an error with the exit code of this process.
            poll: Returns the cause of a request that is not a signal; called about every second.
        """
        self._tell, self._poll = tell, poll

    def hold(self, resume: str) -> None:
        """From now on, record a first request: the loop stops and saves. A second signal ends the process.

        Args:
            resume: `train.resume` of this start; only `auto` goes on from what is saved after it.
        """
        self._again = AGAIN if resume == "auto" else WITH_AUTO
        self._holds = True

    def rest(self, rule: str) -> None:
        """From now on, end at once at any request, because nothing can be lost; `rule` says what was saved."""
        self._rule, self._holds = rule, False

    def leave(self) -> None:
        """End this process with exit code 75 if it was asked to stop."""
        if self.cause is not None:
            self._end(self.stopped(self._rule), Stopped.exit_code)

    def stopped(self, rule: str, cause: str | None = None) -> Stopped:
        """Return the error of a run that was stopped by `cause`, by default that of this process."""
        return Stopped(Problem(cause or self.cause or "stop", rule, self._again))

    def ask(self, cause: str, number: int | None = None) -> None:
        """Handle a request by `cause`, which is signal `number` unless it is None."""
        now, first = time.monotonic(), self._first_at
        if number is not None and first is not None and self._holds:
            if now - first >= REPEAT_S:
                rule = f"{cause}, a second signal, ended the run at once; the steps since the last checkpoint are lost"
                self._end(self.stopped(rule), 128 + number)
            return
        if number is not None and first is None:
            self._first_at = now
        self.cause = self.cause or cause
        if not self._holds:
            self.leave()

    def _hear(self, pipe: int) -> None:
        while True:
            ready, _, _ = select.select([pipe], [], [], POLL_S)
            for number in os.read(pipe, 64) if ready else b"":
                if number in SIGNALS:
                    self.ask(signal.Signals(number).name, number)
            if self.cause is None and (cause := self._poll()):
                self.ask(cause)

    def _end(self, error: Stopped, code: int) -> None:
        self._tell(error, code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # the main thread may be blocked


def _print(error: Stopped, _code: int) -> None:
    print(f"dist-ft: {error.title}\n  {error}", file=sys.stderr, flush=True)
