"""`dist-ft sweep` as the command line calls it."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

from ...config.run import RunConfig
from ..composition.compose import compose
from ..machine.environ import find_site
from ..process import start_module
from .run import Check, sweep
from .space import read_search


def run_sweep(words: Sequence[str], config_dir: str | None, check: Check, train: Sequence[str]) -> int:
    """Run a search and return its exit code.

    Args:
        words: Arguments of the command.
        config_dir: Folder with the user's own groups.
        check: Composes the arguments of a run and checks them.
        train: Module and first arguments of the command that trains a run.
    """

    def composed(tried: Sequence[str]) -> RunConfig:
        return compose(tried, config_dir).config

    def start(given: Sequence[str], environment: Mapping[str, str], output: Path | None) -> subprocess.Popen[bytes]:
        return start_module([*train, *given], environment=environment, output=output)

    return sweep(read_search(words), composed, check, start, find_site().devices)
