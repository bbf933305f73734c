"""TCP ports of this machine: check whether a port is free, and find the process that uses it."""

from __future__ import annotations

import contextlib
import socket
from pathlib import Path

from ...errors import Problem

LISTEN = "0A"


def is_free(port: int) -> bool:
    """Return whether a server can currently listen on this port on all addresses."""
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as TCPStore does
        try:
            probe.bind(("", port))
            probe.listen()
        except OSError:
            return False
    return True


def holder(port: int) -> str | None:
    """Return `process NAME (pid N)` for the process that listens on a port, or None if /proc does not show it."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        with contextlib.suppress(OSError):
            for line in Path(table).read_text().splitlines()[1:]:
                words = line.split()
                if words[3] == LISTEN and int(words[1].rpartition(":")[2], 16) == port:
                    inodes.add(f"socket:[{words[9]}]")
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with contextlib.suppress(OSError):
            if str(handle.readlink()) in inodes:
                process = handle.parent.parent
                return f"process {(process / 'comm').read_text().strip()} (pid {process.name})"
    return None


def port_problem(key: str, port: int) -> Problem | None:
    """Return a problem if the port is in use, else None."""
    if is_free(port):
        return None
    who = holder(port)
    rule = f"port {port} is in use" + (f" by {who}" if who else "")
    return Problem(key, rule, f"stop that process, or set {key} to a free port")
