"""Checks of this machine: disk space and optional libraries."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from ..config.run import RunConfig
from ..data.read.augment import missing_nlpaug
from ..data.read.sets import key_of, sets_of
from ..errors import Problem
from ..pretrained.folder import weight_bytes
from ..track.needs import Variable, tracker_problems

MIB = 2**20
LEAST_ROOM_BYTES = 256 * MIB  # logs, metrics and an adapter, if the size of the weights is not known
FULL_COPIES = 4  # times the size of the weights: a checkpoint with both AdamW moments, and the export


def check_machine(config: RunConfig, variable: Variable = lambda _: None) -> list[Problem]:
    """Return what this machine lacks for the run: a writable folder, disk space, an optional library, or a key.

    Args:
        config: Configuration of the run.
        variable: Returns the value of an environment variable; by default, none is set.
    """
    # `launch.setup` may choose another Python environment for the workers, and set variables.
    trackers = () if getattr(config.launch, "setup", None) else tracker_problems(config.track, variable)
    return [*_disk_problems(config), *_library_problems(config), *trackers]


def _library_problems(config: RunConfig) -> Iterator[Problem]:
    """Check optional libraries, unless `launch.setup` may choose another Python environment for the workers."""
    if config.privacy.is_on and not getattr(config.launch, "setup", None) and find_spec("opacus") is None:
        rule = f"the required package opacus is not installed in {sys.executable}"
        yield Problem("privacy", rule, "run pip install 'dist-ft[privacy]', or remove the privacy keys")
    for name, alone in sets_of(config).items():
        if alone.data.augment is not None and not getattr(config.launch, "setup", None):
            problem = missing_nlpaug(key_of(name, "augment"))
            yield from [problem] if problem else []
    scheme = config.model.quantization or "none"
    if scheme != "none" and not getattr(config.launch, "setup", None) and find_spec("bitsandbytes") is None:
        rule = f"{scheme} requires the package bitsandbytes, which is not installed in {sys.executable}"
        yield Problem("model.quantization", rule, "run pip install bitsandbytes, or set model.quantization=none")


def _disk_problems(config: RunConfig) -> list[Problem]:
    folder = Path(config.output_dir)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [
            Problem(
                "output_dir", f"{folder} is a file, so {config.output_dir} cannot be created", "set another output_dir"
            )
        ]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Problem("output_dir", f"{folder} is not writable", "set output_dir to a writable folder")]
    weights = weight_bytes(config.model.name_or_path)
    needed = max(LEAST_ROOM_BYTES, (weights or 0) * FULL_COPIES if config.method.whole else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        rule = f"{free // MIB} MiB are free in {folder}, but the run needs about {needed // MIB} MiB"
        return [Problem("output_dir", rule, "free disk space, or set output_dir to a folder on a larger disk")]
    return []
