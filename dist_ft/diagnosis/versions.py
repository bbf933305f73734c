"""Checks of the versions of Python and libraries, which are not imported: some are slow or fail on import."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from .finding import Finding, note, ok, problem

SELF = "dist-ft"
# NEEDED is imported by every run; USUAL is only required for some engines, formats or trackers.
NEEDED = ("torch", "transformers", "peft", "pydantic", "hydra-core", "numpy", "safetensors", "rich")
USUAL = ("deepspeed", "datasets", "wandb", "accelerate", "tokenizers", "pyarrow", "gguf", "nvidia-ml-py")


def check_versions() -> Iterator[Finding]:
    """Check Python, and each library against the requirements of this package."""
    yield ok("python", f"{platform.python_version()}, {sys.executable}")  # an older version cannot import this package
    wanted = requirements()
    for name in (*NEEDED, *USUAL):
        found = installed(name)
        needed = name in NEEDED
        requirement = wanted.get(name)
        if found is None:
            make = problem if needed else note
            yield make(name, "is not installed", f"pip install {requirement or name}")
        elif requirement is not None and not requirement.specifier.contains(found, prereleases=True):
            make = problem if needed else note
            yield make(name, f"{found}, but {requirement.specifier} is required", f"pip install '{requirement}'")
        else:
            yield ok(name, found)


def requirements() -> dict[str, Requirement]:
    """Return the requirements of the installed package by name; empty if it is used without being installed."""
    try:
        lines = importlib.metadata.requires(SELF) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    plain = (Requirement(line) for line in lines)
    return {_normal(r.name): r for r in plain if r.marker is None or "extra" not in str(r.marker)}


def installed(name: str) -> str | None:
    """Return the version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
