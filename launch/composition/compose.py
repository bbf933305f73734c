"""Compose the configuration of a run from YAML files and `key=value` arguments, and report all problems together.

Hydra parses the arguments and composes the selected files. Values are set by this module and not by Hydra, because
Hydra stops at the first wrong value and accepts `+typo=1`.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import ValidationError

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from . import keys
from .paths import CONF_DIR, settle_paths
from .site import apply_site
from .words import expand

COMMAND_LINE = "command line"
ROOT = "train"
MISSING = "???"
LEFT_OUT = "left out"  # first words of the origin of a value that was dropped because of what the user set
GLOBAL_GROUPS = {"experiment": "experiment@_global_"}  # files of this group set keys of every section
RESOLVER = re.compile(r"\$\{[^}]*:")  # resolvers such as ${oc.env:X} read values from outside the configuration


@dataclass
class Words:
    """The arguments of the user: choices by group, values by dotted key, and the problems of parsing them."""

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def choose(self, group: str, choice: str) -> None:
        """Record the choice of a group, or a problem if there is one already."""
        if group in self.choices:
            words = f"{group}={self.choices[group]} and {group}={choice}"
            self.problems.append(Problem(group, f"is chosen twice: {words}", "keep one of them"))
        self.choices[group] = choice

    def put(self, key: str, value: Any) -> None:
        """Record the value of a key, or a problem if there is one already."""
        if key in self.values:
            words = f"{self.values[key]!r} and {value!r}"
            self.problems.append(Problem(key, f"is set twice, to {words}", "keep one of them"))
        self.values[key] = value


@dataclass(frozen=True)
class Composed:
    """A valid configuration, and the origin of every key that the user set (key → command line or file).

    Keys whose value was dropped for that reason have an origin too; it begins with `LEFT_OUT`.
    """

    config: RunConfig
    origins: dict[str, str]


def compose(words: Sequence[str], config_dir: str | Path | None = None) -> Composed:
    """Compose and validate the configuration.

    Args:
        words: Arguments of the command line, `group=choice` or `key=value`.
        config_dir: Folder with the user's own groups (`model/mine.yaml`); its files take precedence over `conf/`.

    Raises:
        RequestError: With all problems of the arguments and values.
    """
    user_dir = _user_dir(config_dir)
    groups = list_groups(user_dir)
    sorted_words = sort_words(words, groups)
    problems = sorted_words.problems
    composed = _compose_files(sorted_words.choices, user_dir, problems)
    if composed is None:
        raise RequestError(*problems)
    tree, choices = composed
    origins = _file_origins(sorted_words.choices, user_dir)
    _put_values(tree, sorted_words.values, problems)
    origins.update({group: f"{COMMAND_LINE}: {group}={choice}" for group, choice in sorted_words.choices.items()})
    origins.update(dict.fromkeys(sorted_words.values, COMMAND_LINE))
    problems += apply_site(tree, origins)
    _settle_length(tree, origins)
    _settle_splits(tree, origins, choices["data"])
    tree = _resolve(tree, origins, problems)
    missing = [key for key, value in keys.leaves(tree).items() if value == MISSING]
    for key in missing:
        problems.append(keys.missing_key(key))
        _remove(tree, key)
    config = _validate(tree, origins, set(missing), problems)
    if problems or config is None:
        raise RequestError(*problems)
    return Composed(settle_paths(config), origins)


def list_groups(user_dir: Path | None = None) -> dict[str, list[str]]:
    """Return the choices of every group: one folder for each group, one YAML file for each choice."""
    groups: dict[str, set[str]] = {}
    for root in (CONF_DIR, user_dir):
        if root is not None:
            for file in sorted(root.glob("*/*.yaml")):
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def sort_words(words: Sequence[str], groups: dict[str, list[str]]) -> Words:
    """Sort arguments into group choices and values; record a problem for any other argument."""
    found = Words()
    parser = OverridesParser.create()
    for word in (part for given in words for part in expand(given, groups)):
        name, sign, after = word.partition("=")
        if sign and not after.strip():
            way_out = f"write {name}=VALUE, {name}=null for no value, or '{name}=\"\"' for an empty text"
            if name in groups:
                way_out = f"write {name}=CHOICE, with one of {', '.join(groups[name])}"
            found.problems.append(Problem(word, "has no value", way_out))
            continue
        try:
            override = parser.parse_override(word)
        except (OverrideParseException, HydraException):
            found.problems.append(Problem(word, "cannot be parsed", "write key=value, quoted: 'key=\"some text\"'"))
            continue
        if problem := _refuse(word, override, groups):
            found.problems.append(problem)
        elif override.key_or_group in groups:
            found.choose(override.key_or_group, str(override.value()))
        else:
            value = override.value()
            section = override.key_or_group
            if isinstance(value, dict) and section in RunConfig.model_fields:
                for key, below in value.items():
                    found.put(f"{section}.{key}", below)
            else:
                found.put(section, value)
    return found


def _refuse(word: str, override: Override, groups: dict[str, list[str]]) -> Problem | None:
    """Return the problem of an argument that Hydra accepts but this project does not; None if it is valid."""
    key = override.key_or_group
    if override.is_delete():
        return Problem(word, "keys cannot be deleted", f"set {key}=null or {key}=VALUE")
    if override.is_add():
        return Problem(word, "keys cannot be added to the schema", f"write {word.lstrip('+')}")
    if override.package is not None:
        return Problem(word, "packages (`group@package`) are not supported", f"write {key}={override.value()}")
    if override.is_sweep_override():
        return Problem(word, "is a sweep over several values", f'use `dist-ft sweep`; for a list write {key}="[a, b]"')
    return _refuse_choice(word, key, override.value(), groups)


def _refuse_choice(word: str, key: str, value: Any, groups: dict[str, list[str]]) -> Problem | None:
    """Return the problem of an unknown choice or group, or of a choice made by `group.name`; None if there is none."""
    if key in groups:
        if isinstance(value, dict | list):
            return Problem(word, f"{key} is a group", f"select a choice by name, and set its keys with {key}.KEY=VALUE")
        if str(value) not in groups[key]:
            close = keys.nearest(str(value), groups[key], cutoff=0.6)
            hint = f"did you mean {key}={close}? " if close else ""
            more = {"model": ", or a folder or OWNER/NAME of the Hub", "data": ", or a file, folder or OWNER/NAME"}
            known = f"known: {', '.join(groups[key])}{more.get(key, '')}"
            return Problem(word, f"{key} has no choice {value!r}", f"{hint}{known}")
    section, _, rest = key.partition(".")
    if rest == "name" and section in groups and section in RunConfig.model_fields:
        return Problem(word, "the choice of a group cannot be set by its name key", f"write {section}={value}")
    if "/" in key:
        close = keys.nearest(key, groups)
        return Problem(word, "unknown group", f"did you mean {close}=?" if close else f"known: {', '.join(groups)}")
    return None


def _settle_length(tree: keys.Tree, origins: dict[str, str]) -> None:
    """Keep one of max_steps and num_train_epochs: the command line wins over a file, and a file over the default."""
    ranks = {}
    for key in ("train.max_steps", "train.num_train_epochs"):
        if keys.get_value(tree, key) is not None:
            ranks[key] = 0 if key not in origins else 2 if origins[key] == COMMAND_LINE else 1
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
        origin = origins.get(key, "")
        return 2 if origin == COMMAND_LINE else int(Path(origin).parent.name == "experiment")

    for key in ("data.validation", "data.test"):
        if keys.get_value(tree, key) is not None and strength(key) < strength("data.train"):
            keys.set_value(tree, key, None)
            file = origins.get(key, f"conf/data/{choice}.yaml")
            origins[key] = f"{LEFT_OUT}: that of {file} belongs to its own data.train"


def _user_dir(config_dir: str | Path | None) -> Path | None:
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


def _put_values(tree: keys.Tree, values: dict[str, Any], problems: list[Problem]) -> None:
    for key, value in values.items():
        if blocked := keys.set_value(tree, key, value):
            problems.append(keys.unknown_key(key, tree, f"{key} ({COMMAND_LINE}; {blocked} has no keys of its own)"))


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
