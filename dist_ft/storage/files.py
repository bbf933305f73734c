"""Files on this machine: digests, and the folders of installed packages."""

from __future__ import annotations

import hashlib
import importlib.util
from pathlib import Path

PACKAGE = "package:"
PACKAGE = "package:"


def digest_file(path: Path) -> str:
    """SHA-256 of a file's bytes."""
    whole = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 22):
            whole.update(block)
    return whole.hexdigest()


def find_package(name: str) -> Path | None:
    """The folder of an installed package, found without importing it; None if there is none."""
    try:
        spec = importlib.util.find_spec(name)
    except (ImportError, ValueError):
        return None
    places = list(spec.submodule_search_locations or ()) if spec else []
    return Path(places[0]) if places else None
