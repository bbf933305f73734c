"""A worker ends when what started it has ended.

`kill -9` of torchrun, deepspeed or an ssh client leaves their workers running, and training goes on unseen. A worker
therefore watches the launchers above it; the kernel's parent-death signal covers the nearest one at once.
"""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import threading
import time

import psutil

LAUNCHERS = ("torch.distributed.run", "torchrun", "deepspeed", "dist-ft", "dist_ft", "slurmstepd")
INTERVAL_S = 1.0
PR_SET_PDEATHSIG = 1


def find_launchers() -> list[psutil.Process]:
    """The processes above this one that launched it, nearest first: launchers, shells between them, their sshd.

    An interactive shell is none: a run started with nohup outlives it.
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


def hold() -> None:
    """Watch the launchers from a daemon thread; end this process, hard, when one of them is gone."""
    launchers = find_launchers()
    if not launchers:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    threading.Thread(target=_watch, args=(launchers,), name="lifeline", daemon=True).start()


def _watch(launchers: list[psutil.Process]) -> None:
    while all(process.is_running() and process.status() != psutil.STATUS_ZOMBIE for process in launchers):
        time.sleep(INTERVAL_S)
    # Nobody is left to report to, and a collective may hold the main thread: no clean-up could be relied on.
    os.kill(os.getpid(), signal.SIGKILL)
