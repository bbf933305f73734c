"""The sets of a run's data: one, or those of `data.mixture`, each as a run's configuration of its own."""

from __future__ import annotations

from collections.abc import Iterator

from ..errors import Problem
from ..schema import DataConfig, DataSet, RunConfig
from .fill import template_problems
from .formats import FORMATS, detect

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


def set_problems(config: RunConfig) -> Iterator[Problem]:
    """Sets that are given twice or not at all, formats that the task does not know, templates that cannot be filled."""
    data, mixture = config.data, config.data.mixture
    if mixture is None and not data.train:
        yield Problem("data.train", "must be given", "say data.train=VALUE, or data.mixture={NAME: {train: …}, …}")
        return
    if mixture is not None:
        given = [key for key in ("train", "validation", "test") if getattr(data, key)]
        if given:
            rule = f"data.{given[0]} is given too, and each set of a mixture has its own"
            yield Problem("data.mixture", rule, f"remove data.{given[0]} (data=mixture has none), or data.mixture")
            return
        if not mixture:
            yield Problem("data.mixture", "names no set", "say data.mixture.NAME.train=VALUE for each")
            return
        weighted = [name for name, part in mixture.items() if part.weight is not None]
        if 0 < len(weighted) < len(mixture):
            bare = next(name for name in mixture if name not in weighted)
            rule = f"{bare} has no weight, but {weighted[0]} has one"
            yield Problem("data.mixture", rule, "give all sets a weight, or none")
    for name, alone in sets_of(config).items():
        yield from _format_problems(alone, name)


def _format_problems(alone: RunConfig, name: str) -> Iterator[Problem]:
    data, task = alone.data, alone.task.name
    yield from template_problems(data.template, key_of(name, "template"))
    if both := [column for column in data.template if column in data.columns]:
        rule = f"{', '.join(both)} is in {key_of(name, 'columns')} too"
        yield Problem(key_of(name, "template"), rule, "name a column once")
    found = data.format
    if found == "auto":
        ours = dict.fromkeys([*data.template, *data.columns])
        if data.template and detect(ours, task=task) is None:
            known = "; ".join(f"{n}: {', '.join(form.required)}" for n, form in FORMATS.items() if task in form.tasks)
            rule = f"rows with the columns {', '.join(ours)} are of no known format"
            yield Problem(key_of(name, "template"), rule, f"give the columns of one of task={task}'s ({known})")
        return
    if task in FORMATS[found].tasks:
        return
    known = ", ".join(name for name, form in FORMATS.items() if task in form.tasks)
    rule = f"{found} is not a format of task={task}, which knows auto, {known}"
    way_out = f"choose task={' or '.join(FORMATS[found].tasks)}, or correct the format"
    yield Problem(key_of(name, "format"), rule, way_out)


def _alone(config: RunConfig, given: DataSet) -> RunConfig:
    keys = given.model_dump(exclude={"weight"})
    shared = {key: getattr(config.data, key) for key in ("subset_seed", "shuffle", "cache_dir")}
    data = DataConfig(**keys, **shared)
    return config.model_copy(update={"data": data})
