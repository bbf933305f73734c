"""From YAML files and `key=value` words to a checked configuration, with every problem at once.

Hydra parses the words and composes the chosen files; values are put in here and not by Hydra, which stops at the first
wrong one and lets `+typo=1` through. Beside cli.py this is the only module that knows Hydra.
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

from ..config.run import RunConfig
from ..errors import Problem, RequestError
from . import keys
from .paths import CONF_DIR, settle_paths

COMMAND_LINE = "command line"
ROOT = "train"
MISSING = "???"
GLOBAL_GROUPS = {"experiment": "experiment@_global_"}  # its files set keys of all sections, not of one of its own
RESOLVER = re.compile(r"\$\{[^}]*:")  # ${oc.env:X} and the like reach outside the configuration


@dataclass
class Words:
    """The user's words, sorted: which group gets which choice, which key which value."""

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)


@dataclass(frozen=True)
class Composed:
    """A valid configuration and, for every key that the user set, where."""

    config: RunConfig
    origins: dict[str, str]


def compose(words: Sequence[str], config_dir: str | Path | None = None) -> Composed:
    """Compose the configuration of `words` (`group=choice`, `key=value`).

    Args:
        words: what was typed.
        config_dir: a folder with the user's own groups (`model/mine.yaml`), found before ours.

    Raises:
        RequestError: with every problem of the words and values.
    """
    user_dir = _user_dir(config_dir)
    groups = list_groups(user_dir)
    sorted_words = sort_words(words, groups)
    problems = sorted_words.problems
    tree = _compose_files(sorted_words.choices, user_dir, problems)
    if tree is None:
        raise RequestError(*problems)
    origins = _file_origins(sorted_words.choices, user_dir)
    _put_values(tree, sorted_words.values, problems)
    origins.update({group: f"{COMMAND_LINE}: {group}={choice}" for group, choice in sorted_words.choices.items()})
    origins.update(dict.fromkeys(sorted_words.values, COMMAND_LINE))
    _settle_length(tree, origins)
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
    """Every group and its choices: the folders of the configuration and their files."""
    groups: dict[str, set[str]] = {}
    for root in (CONF_DIR, user_dir):
        if root is not None:
            for file in sorted(root.glob("*/*.yaml")):
                groups.setdefault(file.parent.name, set()).add(file.stem)
    return {group: sorted(choices) for group, choices in sorted(groups.items())}


def sort_words(words: Sequence[str], groups: dict[str, list[str]]) -> Words:
    """Tell group choices from values, and refuse what is neither."""
    found = Words()
    parser = OverridesParser.create()
    for word in words:
        try:
            override = parser.parse_override(word)
        except (OverrideParseException, HydraException):
            found.problems.append(Problem(word, "not understood", "write key=value, quoted: 'key=\"some text\"'"))
            continue
        if problem := _refuse(word, override, groups):
            found.problems.append(problem)
        elif override.key_or_group in groups:
            found.choices[override.key_or_group] = str(override.value())
        else:
            value = override.value()
            section = override.key_or_group
            if isinstance(value, dict) and section in RunConfig.model_fields:
                found.values.update({f"{section}.{key}": below for key, below in value.items()})
            else:
                found.values[section] = value
    return found


def _refuse(word: str, override: Override, groups: dict[str, list[str]]) -> Problem | None:
    """What Hydra would take and we do not; None for an ordinary word."""
    key = override.key_or_group
    if override.is_delete():
        return Problem(word, "a key cannot be deleted", f"set it instead: {key}=null, or {key}=VALUE")
    if override.is_add():
        return Problem(word, "keys are not added: every key is known", f"write {word.lstrip('+')}")
    if override.package is not None:
        return Problem(word, "groups have fixed places here", f"write {key}={override.value()}")
    if override.is_sweep_override():
        return Problem(word, "`train` is one run", f'sweep with `dist-ft sweep`; for a list write {key}="[a, b]"')
    return _refuse_choice(word, key, override.value(), groups)


def _refuse_choice(word: str, key: str, value: Any, groups: dict[str, list[str]]) -> Problem | None:
    """A group without such a choice, or a choice that is not made by its group."""
    if key in groups:
        if isinstance(value, dict | list):
            return Problem(word, f"{key} is a group", f"choose it by name and set its keys by dots: {key}.KEY=VALUE")
        if str(value) not in groups[key]:
            close = keys.nearest(str(value), groups[key], cutoff=0.5)
            hint = f"did you mean {key}={close}? " if close else ""
            return Problem(word, f"{key} has no choice {value!r}", f"{hint}known: {', '.join(groups[key])}")
    section, _, rest = key.partition(".")
    if rest == "name" and section in groups and section in RunConfig.model_fields:
        return Problem(word, "a choice is made by its group", f"write {section}={value}")
    if "/" in key:
        close = keys.nearest(key, groups)
        return Problem(word, "unknown group", f"did you mean {close}=?" if close else f"known: {', '.join(groups)}")
    return None


def _settle_length(tree: keys.Tree, origins: dict[str, str]) -> None:
    """Drop the less deliberate of max_steps and num_train_epochs: a default before a file's before a typed one."""
    ranks = {}
    for key in ("train.max_steps", "train.num_train_epochs"):
        if keys.get_value(tree, key) is not None:
            ranks[key] = 0 if key not in origins else 2 if origins[key] == COMMAND_LINE else 1
    if len(set(ranks.values())) == 2:
        weaker = min(ranks, key=lambda key: ranks[key])
        keys.set_value(tree, weaker, None)
        origins.pop(weaker, None)


def _user_dir(config_dir: str | Path | None) -> Path | None:
    if config_dir is None:
        return None
    path = Path(config_dir).expanduser().absolute()
    if not path.is_dir():
        raise RequestError.of(f"--config-dir {config_dir}", "no such folder", "name a folder with model/mine.yaml …")
    return path


def _compose_files(choices: dict[str, str], user_dir: Path | None, problems: list[Problem]) -> keys.Tree | None:
    """The composed files as plain dictionaries, interpolations unresolved; None where Hydra cannot read them."""
    words = [f"{GLOBAL_GROUPS.get(group, group)}={choice}" for group, choice in choices.items()]
    if user_dir is not None:
        words.append(f"hydra.searchpath=['{user_dir.as_uri()}']")
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(CONF_DIR)):
            config = hydra_compose(config_name=ROOT, overrides=words)
    except (HydraException, OmegaConfBaseException, yaml.YAMLError, ValueError) as error:
        place = str(user_dir) if user_dir else "configuration files"
        problems.append(Problem(place, f"cannot be composed: {error}", "mend the file that is named"))
        return None
    tree = OmegaConf.to_container(config, resolve=False)
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def _put_values(tree: keys.Tree, values: dict[str, Any], problems: list[Problem]) -> None:
    for key, value in values.items():
        if blocked := keys.set_value(tree, key, value):
            problems.append(keys.unknown_key(key, tree, f"{key} ({COMMAND_LINE}; {blocked} is a plain value)"))


def _file_origins(choices: dict[str, str], user_dir: Path | None) -> dict[str, str]:
    """Where the user set keys by files: those of the experiment and of the own folder."""
    origins: dict[str, str] = {}
    for group, choice in choices.items():
        own = user_dir / group / f"{choice}.yaml" if user_dir else None
        file = own if own is not None and own.is_file() else CONF_DIR / group / f"{choice}.yaml"
        if file != own and group != "experiment":
            continue  # one of our choices as it is: the user chose the group, not each of its values
        text = file.read_text(encoding="utf-8")
        tree = yaml.safe_load(text) or {}
        tree.pop("defaults", None)
        whole = group in GLOBAL_GROUPS
        shown = str(file) if file == own else f"conf/{group}/{choice}.yaml"
        origins.update(dict.fromkeys(keys.leaves(tree if whole else {group: tree}), shown))
    return origins


def _resolve(tree: keys.Tree, origins: dict[str, str], problems: list[Problem]) -> keys.Tree:
    """Replace `${key}` by the key's value; refuse what reaches outside the configuration."""
    for key, value in keys.leaves(tree).items():
        if RESOLVER.search(str(value)):
            where = f"{key} ({origins[key]})" if key in origins else key
            rule = "`${NAME:…}` reads what is outside the configuration, and a run's file would keep it"
            problems.append(Problem(where, rule, "write the value itself; secrets stay in the environment"))
            _remove(tree, key)
    try:
        resolved = OmegaConf.to_container(OmegaConf.create(tree), resolve=True)
    except OmegaConfBaseException as error:
        first_line = str(error).splitlines()[0]
        problems.append(Problem("${…}", first_line, "name an existing key, as in ${train.seed}"))
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
