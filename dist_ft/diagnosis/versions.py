"""Versions of Python and of the libraries; none but torch is imported, for some are slow or fail on import."""

from __future__ import annotations

import importlib.metadata
import platform
import re
import sys
from collections.abc import Iterator

from packaging.requirements import Requirement

from .finding import Finding, note, ok, problem

SELF = "dist-ft"
# What every run imports; a run of another engine or without W&B goes without the others.
NEEDED = ("torch", "transformers", "peft", "pydantic", "hydra-core", "numpy", "safetensors", "rich")
USUAL = ("deepspeed", "datasets", "wandb", "accelerate", "tokenizers", "pyarrow", "gguf", "bitsandbytes")


def check_versions() -> Iterator[Finding]:
    """Python, and each library against what the package asks for."""
    yield ok("python", f"{platform.python_version()}, {sys.executable}")  # an older one does not come this far
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
            yield make(name, f"{found}, but {requirement.specifier} is needed", f"pip install '{requirement}'")
        else:
            yield ok(name, found)


def requirements() -> dict[str, Requirement]:
    """What the installed package asks for, by name; nothing where it is used from a folder without installing."""
    try:
        lines = importlib.metadata.requires(SELF) or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    plain = (Requirement(line) for line in lines)
    return {_normal(r.name): r for r in plain if r.marker is None or "extra" not in str(r.marker)}


def installed(name: str) -> str | None:
    """The version of a distribution, or None."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
