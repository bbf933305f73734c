"""The root folder of the cache, and the hashes used as names of its subfolders."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..config.run import RunConfig
from ..state import Beat, unwatched
from .files import digest_file

CODE_VERSION = 4  # of prepared content: increase it with every change of tokens, labels, packing or conversion
_REMEMBERED_BYTES = 64 << 20


def cache_root(config: RunConfig) -> Path:
    """Return `data.cache_dir`, or `~/.cache/dist_ft` if it is not set."""
    return Path(config.data.cache_dir or "~/.cache/dist_ft").expanduser()


def remembering_digest(root: Path, tick: Beat = unwatched) -> Callable[[Path], str]:
    """Return a variant of `digest_file` that caches the digests of large files.

    They are cached by path, inode, size, and the times of the last changes of content and inode: a file that was
    written in place and given its old modification time is hashed again.
    """

    def digest(path: Path) -> str:
        state = path.stat()
        if state.st_size < _REMEMBERED_BYTES:
            return digest_file(path, tick)
        seen = hash_of([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino])
        memory = root / "digests" / seen
        with contextlib.suppress(OSError):
            if len(known := memory.read_text(encoding="ascii")) == 64:
                return known
        value = digest_file(path, tick)
        with contextlib.suppress(OSError):  # without the cached digest the file is only hashed again
            memory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False, encoding="ascii") as file:
                file.write(value)
            os.replace(file.name, memory)
        return value

    return digest


def hash_of(content: Any) -> str:
    """Return the first 32 hexadecimal digits of the SHA-256 of `content` as JSON."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
