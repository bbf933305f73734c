"""The splits and sets of a run's data; each set of `data.mixture` gets a `RunConfig` of its own."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from ...config.data import DataConfig, DataSet
from ...config.run import RunConfig


def sources_of(config: RunConfig) -> Iterator[tuple[str, str]]:
    """Every source of data with its key."""
    for key in ("train", "validation", "test"):
        for name, alone in sets_of(config, key).items():
            value = getattr(alone.data, key)  # folds of data.train have no source of their own
            for source in [value] if isinstance(value, str) else value or []:
                yield key_of(name, key), source


SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
ALONE = ""  # the name of the only set of a run without a mixture


def sets_of(config: RunConfig, split: str = "train") -> dict[str, RunConfig]:
    """Name → the run's configuration with this set as its data, of the sets that have the split, by name.

    What is prepared of a set is therefore the same alone and in any mixture. The order is that of the names, so that
    it does not depend on how a configuration is written.
    """
    mixture = config.data.mixture
    if mixture is None:
        return {ALONE: config} if config.data.sources(split) else {}
    return {name: _alone(config, mixture[name]) for name in sorted(mixture) if getattr(mixture[name], split)}


def key_of(name: str, key: str) -> str:
    """Where a set's `key` stands in the configuration."""
    return f"data.mixture.{name}.{key}" if name else f"data.{key}"


def name_in_mixture(where: str, name: str) -> str:
    """The key of a set's own problem as it stands in the configuration; a place that is no such key stays."""
    own = where.startswith("data.") and not where.startswith("data.mixture")
    return key_of(name, where.removeprefix("data.")) if own else where


def _alone(config: RunConfig, given: DataSet) -> RunConfig:
    keys = given.model_dump(exclude={"weight"})
    shared = {key: getattr(config.data, key) for key in ("subset_seed", "shuffle", "cache_dir")}
    data = DataConfig(**keys, **shared)
    return config.model_copy(update={"data": data})
