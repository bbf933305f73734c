"""Splits and datasets of a run; each dataset of `data.mixture` gets its own `RunConfig`."""

from __future__ import annotations

from typing import Literal

from ...config.data import DataConfig, DataSet
from ...config.run import RunConfig

SplitName = Literal["train", "validation", "test"]
SPLITS: tuple[SplitName, ...] = ("train", "validation", "test")
ALONE = ""  # name of the only dataset of a run without a mixture


def sets_of(config: RunConfig, split: str = "train") -> dict[str, RunConfig]:
    """Return the datasets that have the split, as a mapping from name to the run configuration with only this dataset.

    A dataset is therefore prepared identically on its own and in any mixture. The datasets are sorted by name, so that
    their order does not depend on the order of keys in the configuration.
    """
    mixture = config.data.mixture
    if mixture is None:
        return {ALONE: config} if config.data.sources(split) else {}
    return {name: _alone(config, mixture[name]) for name in sorted(mixture) if getattr(mixture[name], split)}


def key_of(name: str, key: str) -> str:
    """Return the full configuration key of `key` of a dataset."""
    return f"data.mixture.{name}.{key}" if name else f"data.{key}"


def name_in_mixture(where: str, name: str) -> str:
    """Return the full configuration key for a `data.` key of a single dataset; return other locations unchanged."""
    own = where.startswith("data.") and not where.startswith("data.mixture")
    return key_of(name, where.removeprefix("data.")) if own else where


def _alone(config: RunConfig, given: DataSet) -> RunConfig:
    keys = given.model_dump(exclude={"weight"})
    keys_of_all = ("subset_seed", "shuffle", "special_tokens_in_text", "num_proc", "cache_dir")
    shared = {key: getattr(config.data, key) for key in keys_of_all}
    data = DataConfig(**keys, **shared)
    return config.model_copy(update={"data": data})
