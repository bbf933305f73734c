"""Pass stop signals on to workers, in the process of a launcher: `python -m dist_ft.launch.forward MODULE ARGUMENTS`.

torchrun and DeepSpeed's launcher kill their workers 30 s after a signal, which may be too short for a checkpoint, and
handle signals that were ignored when they started. Here, a thread passes signals on to the workers, which decide what
to do (dist_ft/process/stop.py), and the launcher only waits for them.
"""

from __future__ import annotations

import contextlib
import os
import runpy
import signal
import sys
import threading
from typing import Any

import psutil

from ..errors import Problem, Stopped
from ..process.stop import AGAIN, SIGNALS, accepted_signals

WORKED_S = 0.5  # processor time, which workers use for their imports alone
NOTHING_STARTED = "no worker was started yet, so nothing is lost"


def forward_signals() -> None:
    """Pass the signals that stop a run on to the child processes from now on; call this in the main thread."""
    accepted = accepted_signals()
    # Children inherit the mask: a signal that reaches a worker before it listens waits until it does.
    signal.pthread_sigmask(signal.SIG_BLOCK, accepted)
    install = signal.signal

    def install_others(number: int, handler: Any) -> Any:
        return signal.getsignal(number) if number in SIGNALS else install(number, handler)

    signal.signal = install_others  # type: ignore[assignment]  # the launcher in this process must not install handlers of its own
    threading.Thread(target=_forward, args=(accepted,), name="forward", daemon=True).start()


def _forward(accepted: list[signal.Signals]) -> None:
    while True:
        number = signal.Signals(signal.sigwait(accepted))
        workers = psutil.Process().children()
        if not workers:
            if os.times().children_user < WORKED_S:  # otherwise they have ended and said why
                print(stopped_before_workers(number), file=sys.stderr, flush=True)
            os._exit(Stopped.exit_code)
        for worker in workers:
            with contextlib.suppress(psutil.Error):
                worker.send_signal(number)


def stopped_before_workers(number: int) -> str:
    """Return the message of a run that was stopped by signal `number` before a worker was started."""
    return f"dist-ft: {Stopped.title}\n  {Problem(signal.Signals(number).name, NOTHING_STARTED, AGAIN)}"


def main() -> None:
    """Run the module that the first argument names as the main program."""
    forward_signals()
    module = sys.argv.pop(1)
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
