"""Atomic publication of cache folders: a published folder is always complete."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from ..errors import MachineError
from .files import is_disk_full

_MANIFEST = "manifest.json"


def is_whole(folder: Path) -> bool:
    """Return whether all files of the published `folder` exist with their recorded sizes."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Create `folder` atomically with the files that `build` writes, unless it is already complete.

    A lock makes sure that concurrent processes build the folder only once.

    Raises:
        MachineError: If the cache is not writable or the disk is full.
    """
    from filelock import FileLock

    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):
                return
            for rest in (folder, *folder.parent.glob(f".{folder.name}-*")):  # incomplete, or left by a killed process
                shutil.rmtree(rest, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                build(staging)
                _finish(staging)
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def require_room(folder: Path, needed_bytes: int) -> None:
    """Check that the disk of `folder`, which need not exist yet, has enough free space.

    Raises:
        MachineError: If less than `needed_bytes` are free.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        rule = f"has {free >> 20} MiB free, but about {needed_bytes >> 20} MiB are needed"
        raise MachineError.of(str(folder), rule, "free disk space, or set data.cache_dir to a folder on another disk")


def _finish(folder: Path) -> None:
    """Write the manifest and flush every file to disk."""
    folder.chmod(0o755)  # other users of a shared cache need read access
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({str(f.relative_to(folder)): f.stat().st_size for f in files}), encoding="utf-8")
    for path in (*files, manifest):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if is_disk_full(error):
            way_out = "free disk space, or set data.cache_dir to a folder on another disk"
            raise MachineError.of(str(folder.parent), "no space is left on the disk", way_out) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            way_out = "set data.cache_dir to a writable folder"
            raise MachineError.of(str(folder.parent), f"is not writable ({error.strerror})", way_out) from error
        raise
