"""Parse arguments of the command line into choices and values; refuse what Hydra accepts but this project does not."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, OverrideParseException

from ...config.run import RunConfig
from ...errors import Problem
from . import keys
from .words import expand


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
    if key.partition(".")[0].partition("/")[0] == "hydra":
        way_out = "set run_name or output_dir for the folder of a run; `dist-ft sweep` runs several"
        return Problem(word, "settings of Hydra are not used", way_out)
    if override.is_delete():
        way_out = f"set {key}=null or {key}=VALUE" if key not in groups else f"set {key}=CHOICE; track=off disables W&B"
        return Problem(word, f"{'groups' if key in groups else 'keys'} cannot be deleted", way_out)
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
