"""The owner of a run's folder: a second start in the same folder is refused.

POSIX record locks (fcntl(2)) are used, which NFS and parallel file systems support and which end with the process that
holds them, also when it is killed. The command and rank 0 lock a byte each of one file, because the command starts
rank 0, and because either can run without the other.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import fcntl
import json
import os
import socket
import struct
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..config.plan import LOCK_FILE
from ..errors import MachineError, RequestError

COMMAND, WORKERS = 0, 1  # the byte that each locks
ENDING_S = 10.0  # how long the workers of a killed command may take to end
FLOCK = "hhqqi"  # struct flock of 64-bit Linux: type, whence, start, length, process
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP)


@contextlib.contextmanager
def command_owns(run_dir: Path) -> Iterator[None]:
    """Own a run's folder for a command that starts workers, which must not run yet.

    Raises:
        RequestError: If another command or worker owns the folder.
        MachineError: If the folder is not writable.
    """
    handle = _open(run_dir)
    try:
        _take(handle, COMMAND, run_dir, 0)
        _take(handle, WORKERS, run_dir, ENDING_S)
        fcntl.lockf(handle, fcntl.LOCK_UN, 1, WORKERS)
        _sign(handle)
        yield
    finally:
        os.close(handle)


def own(run_dir: Path) -> None:
    """Own a run's folder as rank 0, until this process ends.

    Raises:
        RequestError: If rank 0 of another start owns the folder.
        MachineError: If the folder is not writable.
    """
    handle = _open(run_dir)
    _take(handle, WORKERS, run_dir, ENDING_S)
    _sign(handle)


@dataclass(frozen=True)
class Owner:
    """The process that owns a run's folder."""

    process: int  # id on its host
    host: str  # of the process that signed last: rank 0, or the command before there are workers


def is_owned(run_dir: Path) -> bool:
    """Return whether rank 0 of a start owns the folder; not for a process that owns it itself, see `find_owner`."""
    return _find(run_dir, (WORKERS,)) is not None


def find_owner(run_dir: Path) -> Owner | None:
    """Return the command or rank 0 that owns a run's folder; None if nothing runs there.

    Not for a process that owns the folder itself: closing the file here would end its lock.
    """
    return _find(run_dir, (COMMAND, WORKERS))


def _find(run_dir: Path, places: tuple[int, ...]) -> Owner | None:
    try:
        handle = os.open(run_dir / LOCK_FILE, os.O_RDONLY)
    except OSError:
        return None
    try:
        for byte in places:
            asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
            kind, _, _, _, process = struct.unpack(FLOCK, fcntl.fcntl(handle, fcntl.F_GETLK, asked))
            if kind != fcntl.F_UNLCK:
                signed = _signature(handle)
                return Owner(process, str(signed.get("host", "an unknown host")))
    finally:
        os.close(handle)
    return None


def _open(run_dir: Path) -> int:
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        return os.open(run_dir / LOCK_FILE, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise MachineError.of(
            str(run_dir), f"cannot be written: {error}", "free disk space, or set output_dir"
        ) from error


def _take(handle: int, byte: int, run_dir: Path, wait_s: float) -> None:
    deadline = time.monotonic() + wait_s
    while True:
        try:
            fcntl.lockf(handle, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
            return
        except OSError as error:
            if error.errno in UNSUPPORTED:
                print(f"dist-ft: {run_dir}: its file system has no locks; start this run only once", file=sys.stderr)
                return
            if error.errno not in (errno.EACCES, errno.EAGAIN):
                raise
        if time.monotonic() >= deadline:
            way_out = "wait until it has ended or stop it, or set run_name to a new name"
            raise RequestError.of(str(run_dir), f"is in use by another start of this run{_owner_text(handle)}", way_out)
        time.sleep(0.1)


def _sign(handle: int) -> None:
    """Write who owns the folder, for the error of another start."""
    now = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    text = json.dumps({"host": socket.gethostname(), "process": os.getpid(), "since": now}).encode()
    with contextlib.suppress(OSError):  # the lock holds without it
        os.pwrite(handle, text, 0)
        os.ftruncate(handle, len(text))


def _signature(handle: int) -> dict[str, object]:
    with contextlib.suppress(OSError, ValueError):
        owner = json.loads(os.pread(handle, 4096, 0))
        return owner if isinstance(owner, dict) else {}
    return {}


def _owner_text(handle: int) -> str:
    with contextlib.suppress(KeyError):
        owner = _signature(handle)
        return f" (process {owner['process']} on {owner['host']}, since {owner['since']})"
    return ""
