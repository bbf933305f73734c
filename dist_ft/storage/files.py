"""Digests of files, and the folders of installed packages."""

from __future__ import annotations

import errno
import hashlib
import importlib.util
import os
from pathlib import Path

from ..state import Beat, unwatched

PACKAGE = "package:"
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
READ_BYTES = 4 << 20


def digest_file(path: Path, tick: Beat = unwatched) -> str:
    """Return the SHA-256 of a file as hexadecimal digits; `tick` is called for each piece that was read."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(READ_BYTES):
            whole.update(block)
            tick(f"hashing {path}")
    return whole.hexdigest()


def is_disk_full(error: BaseException) -> bool:
    """Return whether an error says that a disk or a quota is full; libraries in Rust say it by their message only."""
    if isinstance(error, OSError) and error.errno in DISK_FULL:
        return True
    return any(os.strerror(number) in str(error) for number in DISK_FULL)


def find_package(name: str) -> Path | None:
    """Return the folder of an installed package without importing it; None if it is not installed."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None
