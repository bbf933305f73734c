"""End a worker when the launcher that started it has ended.

`kill -9` of torchrun, deepspeed or an ssh client leaves their workers running unnoticed. Each worker therefore watches
the launchers among its parent processes; on Linux, the parent-death signal covers the nearest one without delay.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time
from collections.abc import Callable

import psutil

LAUNCHERS = ("torch.distributed.run", "torchrun", "deepspeed", "dist-ft", "dist_ft", "slurmstepd")
INTERVAL_S = 1.0
PR_SET_PDEATHSIG = 1


def find_launchers() -> list[psutil.Process]:
    """Return the parent processes that launched this one, nearest first: launchers, shells between them, their sshd.

    Interactive shells are not included, since a run started with nohup must outlive them.
    """
    chain: list[psutil.Process] = []
    found = 0
    for parent in psutil.Process().parents():
        try:
            name, command = parent.name(), parent.cmdline()
        except psutil.Error:
            break
        is_launcher = any(word in part for part in command[:4] for word in LAUNCHERS)
        is_script = name in ("sh", "bash", "dash") and "-c" in command[:2]
        is_session = name.startswith("sshd") and bool(chain)
        if not (is_launcher or is_script or is_session):
            break
        chain.append(parent)
        if is_launcher or is_session:
            found = len(chain)
        if is_session:
            break
    return chain[:found]


def hold(leave: Callable[[], None] = lambda: None) -> None:
    """Watch the launchers in a daemon thread and kill this process with SIGKILL when one of them has ended.

    Args:
        leave: Called before that, so that the end is not taken for a failure of this process.
    """
    launchers = find_launchers()
    if not launchers:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(launchers, leave), name="lifeline", daemon=True).start()


def _watch(launchers: list[psutil.Process], leave: Callable[[], None]) -> None:
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in launchers):
        time.sleep(INTERVAL_S)
    leave()
    # A collective may block the main thread, so a clean shutdown cannot be relied on.
    os.kill(os.getpid(), signal.SIGKILL)
