"""Resolve paths: folders of this package, `package:` sources, and relative paths of the user."""

from __future__ import annotations

import glob
import importlib.util
import os
from pathlib import Path

from ...config.data import DataConfig, DataSet
from ...config.launch import HostfileConfig, SlurmConfig
from ...config.run import RunConfig
from ...config.task import InstructionConfig, PreferenceConfig, RewardConfig
from ...errors import RequestError

PACKAGE = "package:"
CONF_DIR = Path(__file__).parents[2] / "conf"  # dist_ft/conf when installed, conf/ in a checkout
SLURM_DIR = Path(__file__).parents[2] / "slurm"


def settle_paths(config: RunConfig) -> RunConfig:
    """Make paths of existing files and folders absolute, so that workers find them from any working directory.

    A path that does not exist is kept unchanged, because it may be a hub id. A data source `package:PACKAGE/FILE`
    becomes the path of that file in the installed package.

    Raises:
        RequestError: If a named package is not installed.
    """
    data: dict[str, object] = _settle_splits(config.data, "data")
    if config.data.mixture is not None:
        data["mixture"] = {
            name: part.model_copy(update=_settle_splits(part, f"data.mixture.{name}"))
            for name, part in config.data.mixture.items()
        }
    model = {key: _settle(getattr(config.model, key)) for key in ("name_or_path", "tokenizer")}
    changes: dict[str, object] = {
        "output_dir": _absolute(config.output_dir),
        "data": config.data.model_copy(update=data),
        "model": config.model.model_copy(update=model),
    }
    if config.train.resume not in ("auto", "never"):
        changes["train"] = config.train.model_copy(update={"resume": _absolute(config.train.resume)})
    if isinstance(config.task, InstructionConfig | PreferenceConfig | RewardConfig):
        changes["task"] = config.task.model_copy(update={"chat_template": _settle(config.task.chat_template)})
    if isinstance(config.launch, HostfileConfig):
        path = _absolute(config.launch.hostfile)
        changes["launch"] = config.launch.model_copy(update={"hostfile": path})
    if isinstance(config.launch, SlurmConfig):
        own = {key: _settle(getattr(config.launch, key)) for key in ("template", "container")}
        changes["launch"] = config.launch.model_copy(update=own)
    return config.model_copy(update=changes)


def _settle_splits(data: DataConfig | DataSet, key: str) -> dict[str, object]:
    return {split: _settle_sources(f"{key}.{split}", getattr(data, split)) for split in ("train", "validation", "test")}


def _settle_sources(key: str, sources: str | list[str] | None) -> str | list[str] | None:
    if isinstance(sources, list):
        return [_settle_source(key, source) for source in sources]
    return None if sources is None else _settle_source(key, sources)


def _settle_source(key: str, source: str) -> str:
    if not source.startswith(PACKAGE):
        return _settle(source) or source
    package, _, inside = source.removeprefix(PACKAGE).partition("/")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None or not spec.submodule_search_locations:
        way_out = f"install the Python package {package!r}, or name a file"
        raise RequestError.of(key, f"{source}: the Python package is not installed", way_out)
    return str(Path(spec.submodule_search_locations[0]).resolve() / inside)


def _settle(path: str | None) -> str | None:
    """Return the absolute form of an existing path or matching glob; return anything else unchanged."""
    if path is None:
        return None
    expanded = str(Path(path).expanduser())
    there = Path(expanded).exists() or (glob.has_magic(expanded) and glob.glob(expanded, recursive=True))
    return _absolute(path) if there else path


def _absolute(path: str) -> str:
    return os.path.abspath(Path(path).expanduser())
