"""Compose the configuration of a run from YAML files and `key=value` arguments, and report all problems together.

Hydra parses the arguments and composes the selected files. Values are set by this module and not by Hydra, because
Hydra stops at the first wrong value and accepts `+typo=1`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from . import keys
from .file import LEFT_OUT, ConfigFile, is_file, read_file
from .parse import Words, sort_words
from .paths import CONF_DIR, settle_paths
from .site import apply_site

COMMAND_LINE = "command line"
ROOT = "train"
MISSING = "???"
PLACE = re.compile(r":[0-9]+$")  # end of the origin of a value in the user's file
GLOBAL_GROUPS = {"experiment": "experiment@_global_"}  # files of this group set keys of every section
RESOLVER = re.compile(r"\$\{[^}]*:")  # resolvers such as ${oc.env:X} read values from outside the configuration


@dataclass(frozen=True)
class Composed:
    """A valid configuration, and the origin of every key that the user set (key → command line or file).

    Keys whose value was dropped for that reason have an origin too; it begins with `LEFT_OUT`. `typed` is the
    configuration with paths as the user gave them.
    """

    config: RunConfig
    origins: dict[str, str]
    typed: RunConfig


def compose(words: Sequence[str], config_dir: str | Path | None = None) -> Composed:
    """Compose and validate the configuration.

    Args:
        words: Arguments of the command line: `group=choice`, `key=value`, and the name of at most one YAML file.
        config_dir: Folder with the user's own groups (`model/mine.yaml`); its files take precedence over `conf/`.

    Raises:
        RequestError: With all problems of the arguments and values.
    """
    user_dir = find_user_dir(config_dir)
    groups = list_groups(user_dir)
    file = read_file(words, groups)
    typed = sort_words([word for word in words if not is_file(word)], groups)
    problems = [*file.problems, *typed.problems]
    left_out = file.without(typed.choices)
    choices = {**file.choices, **typed.choices}
    composed = _compose_files(choices, user_dir, problems)
    if composed is None:
        raise RequestError(*problems)
    tree, all_choices = composed
    origins = {**_file_origins(choices, user_dir), **left_out, **file.origins()}
    origins.update({group: f"{COMMAND_LINE}: {group}={choice}" for group, choice in typed.choices.items()})
    origins.update(dict.fromkeys(typed.values, COMMAND_LINE))
    _put_values(tree, {**file.values, **_renamed(file, typed), **typed.values}, origins, problems)
    problems += apply_site(tree, origins)
    _settle_length(tree, origins)
    _settle_splits(tree, origins, all_choices["data"])
    tree = _resolve(tree, origins, problems)
    missing = [key for key, value in keys.leaves(tree).items() if value == MISSING]
    for key in missing:
        problems.append(keys.missing_key(key))
        _remove(tree, key)
    config = _validate(tree, {**file.lines, **origins}, set(missing), problems)
    if problems or config is None:
        raise RequestError(*problems)
    return Composed(settle_paths(config), origins, config)


def default_values(choices: dict[str, str]) -> dict[str, Any]:
    """Return the values that the files of `conf/` have for choices, by dotted key, with unresolved interpolations."""
    problems: list[Problem] = []
    composed = _compose_files(choices, None, problems)
    if composed is None:
        raise RequestError(*problems)
    return keys.leaves(composed[0])


def list_groups(user_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the choices of every group: one folder for each group, one YAML file for each choice."""
    groups: dict[str, set[str]] = {}
    for root in (CONF_DIR, user_dir):
        if root is not None:
            for file in sorted(root.glob("*/*.yaml")):
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def _settle_length(tree: keys.Tree, origins: dict[str, str]) -> None:
    """Keep one of max_steps and num_train_epochs, that of the stronger origin: see `_strength`."""
    ranks = {}
    for key in ("train.max_steps", "train.num_train_epochs"):
        if keys.get_value(tree, key) is not None:
            ranks[key] = _strength(origins.get(key))
    if len(set(ranks.values())) == 2:
        weaker = min(ranks, key=lambda key: ranks[key])
        keys.set_value(tree, weaker, None)
        origins.pop(weaker, None)


def _settle_splits(tree: keys.Tree, origins: dict[str, str], choice: str) -> None:
    """Drop the validation and test data of a file whose `data.train` was replaced.

    The splits of a file belong together: a model must not be selected by the rows of a data set that it is not trained
    on. An experiment replaces `data.train` of the choice of `data`, and the command line that of both.

    Args:
        tree: The composed configuration, which is changed.
        origins: Origins of the keys that the user set; the dropped keys are added.
        choice: The choice of the group `data`.
    """

    def strength(key: str) -> int:
        origin = origins.get(key)
        # a file of --config-dir is a choice of data like those of conf/
        of_choice = origin is not None and not PLACE.search(origin) and Path(origin).parent.name == "data"
        return 0 if of_choice else _strength(origin)

    for key in ("data.validation", "data.test"):
        if keys.get_value(tree, key) is not None and strength(key) < strength("data.train"):
            keys.set_value(tree, key, None)
            file = origins.get(key, f"conf/data/{choice}.yaml")
            origins[key] = f"{LEFT_OUT}: that of {file} belongs to its own data.train"


def _strength(origin: str | None) -> int:
    """Return which of several values counts: command line > the user's file > experiment or own group > default."""
    if origin is None or origin.startswith(LEFT_OUT):
        return 0
    return 3 if origin == COMMAND_LINE else 2 if PLACE.search(origin) else 1


def _renamed(file: ConfigFile, typed: Words) -> dict[str, str]:
    """Return the folder of a repeated run that gets another name: next to that of the first."""
    if not file.repeats or "run_name" not in typed.values or "output_dir" not in file.values:
        return {}
    return {"output_dir": str(Path(file.values["output_dir"]).parent / str(typed.values["run_name"]))}


def find_user_dir(config_dir: str | Path | None) -> Path | None:
    """Return the absolute path of the folder with the user's own groups.

    Raises:
        RequestError: If it does not exist.
    """
    if config_dir is None:
        return None
    path = Path(config_dir).expanduser().absolute()
    if not path.is_dir():
        raise RequestError.of(
            f"--config-dir {config_dir}", "does not exist", "name a folder with groups (model/*.yaml)"
        )
    return path


def _compose_files(
    choices: dict[str, str], user_dir: Path | None, problems: list[Problem]
) -> tuple[keys.Tree, dict[str, str]] | None:
    """Compose the files.

    Returns:
        Nested dictionaries with unresolved interpolations, and the choice of each group; None if Hydra fails.
    """
    words = [f"{GLOBAL_GROUPS.get(group, group)}={choice}" for group, choice in choices.items()]
    if user_dir is not None:
        words.append(f"hydra.searchpath=['{user_dir.as_uri()}']")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = hydra_compose(config_name=ROOT, overrides=words, return_hydra_config=True)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        place = str(user_dir) if user_dir else "configuration files"
        problems.append(Problem(place, f"cannot be composed: {error}", "correct the file named in the message"))
        return None
    chosen = config.hydra.runtime.choices
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    del tree["hydra"]
    return {str(key): value for key, value in tree.items()}, {str(group): chosen[group] for group in chosen}


def _put_values(tree: keys.Tree, values: dict[str, Any], origins: dict[str, str], problems: list[Problem]) -> None:
    for key, value in values.items():
        if blocked := keys.set_value(tree, key, value):
            where = f"{key} ({origins.get(key, COMMAND_LINE)}; {blocked} has no keys of its own)"
            problems.append(keys.unknown_key(key, tree, where))


def _file_origins(choices: dict[str, str], user_dir: Path | None) -> dict[str, str]:
    """Return the origins of the keys that the user set through files: experiments, and files of `--config-dir`."""
    origins: dict[str, str] = {}
    for group, choice in choices.items():
        own = user_dir / group / f"{choice}.yaml" if user_dir else None
        file = own if own is not None and own.is_file() else CONF_DIR / group / f"{choice}.yaml"
        if file != own and group != "experiment":
            continue  # a choice from conf/: the user selected it as a whole and did not set its individual keys
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) or {}
        tree.pop("defaults", None)
        whole = group in GLOBAL_GROUPS
        shown = str(file) if file == own else f"conf/{group}/{choice}.yaml"
        origins.update(dict.fromkeys(keys.leaves(tree if whole else {group: tree}), shown))
    return origins


def _resolve(tree: keys.Tree, origins: dict[str, str], problems: list[Problem]) -> keys.Tree:
    """Resolve `${key}` interpolations, and reject resolvers that read values from outside the configuration."""
    for key, value in keys.leaves(tree).items():
        if RESOLVER.search(str(value)):
            where = f"{key} ({origins[key]})" if key in origins else key
            rule = "`${NAME:…}` reads a value from outside the configuration, which run.yaml would then store"
            problems.append(Problem(where, rule, "write the value itself, and keep secrets in the environment"))
            _remove(tree, key)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        problems.append(Problem("${…}", first_line, "use the name of an existing key, for example ${train.seed}"))
        raise RequestError(*problems) from None
    assert isinstance(resolved, dict)
    return {str(key): value for key, value in resolved.items()}


def _remove(tree: keys.Tree, key: str) -> None:
    section, _, rest = key.partition(".")
    if rest:
        tree[section].pop(rest, None)
    else:
        tree.pop(section, None)


def _validate(tree: keys.Tree, origins: dict[str, str], missing: set[str], problems: list[Problem]) -> RunConfig | None:
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        reported = {problem.where.split(" ")[0] for problem in problems} | missing
        found = keys.schema_problems(error, tree, origins)
        problems += [problem for problem in found if problem.where.split(" ")[0] not in reported]
        return None
