"""Read the configuration of a run from one YAML file.

A section is the name of a choice or a source (`method: lora`, `model: Qwen/Qwen3-0.6B`), or keys, among which `name`
selects the choice (`method: {name: lora, r: 16}`). The `run.yaml` of a run is such a file too: it repeats the run.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from ...checks.batch import AUTO
from ...config.run import RunConfig
from ...errors import Problem, RequestError
from . import keys
from .words import expand

ENDINGS = (".yaml", ".yml")
NAME = "name"
RUN_KEYS = {"config", "origins", "world_size"}  # top-level keys by which a run.yaml is recognized
LEFT_OUT = "left out"  # first words of the origin of a value that was dropped because of what the user set
DERIVED = ("model.quantization",)  # keys that follow from others unless they are set, and are noted in run.yaml
HYDRA_KEYS = ("defaults", "hydra")


@dataclass
class ConfigFile:
    """Content of a file: choices by group and values by dotted key; both are empty without a file.

    `lines` has the place (`FILE:LINE`) of every key, also of those below a value. `given` are the groups and keys that
    the user set: all of them, except in a `run.yaml`, which notes what the user had set.
    """

    choices: dict[str, str] = field(default_factory=dict)
    values: dict[str, Any] = field(default_factory=dict)
    lines: dict[str, str] = field(default_factory=dict)
    given: set[str] = field(default_factory=set)
    problems: list[Problem] = field(default_factory=list)
    repeats: bool = False

    def origins(self) -> dict[str, str]:
        """Return the origin of everything that the user set: its place, with the choice for a group."""
        chosen = {group: f"{self.lines[group]}: {group}={choice}" for group, choice in self.choices.items()}
        return {key: chosen.get(key, self.lines[key]) for key in self.lines if key in self.given}

    def without(self, choices: Mapping[str, str]) -> dict[str, str]:
        """Drop the sections for which the command line makes another choice.

        Returns:
            Origins of the dropped keys.
        """
        dropped = {}
        for group, choice in choices.items():
            former = self.choices.get(group)
            if former == choice:
                continue
            for key in [key for key in self.values if key.startswith(f"{group}.")]:
                del self.values[key]
                if key in self.given:
                    dropped[key] = f"{LEFT_OUT}: {self.lines[key]} is replaced by {group}={choice}"
            self.choices.pop(group, None)
            self.given -= {group, *dropped}
        return dropped


def is_file(word: str) -> bool:
    """Return whether an argument of the command line is the name of a configuration file."""
    return "=" not in word and word.endswith(ENDINGS)


def read_file(words: Sequence[str], groups: Mapping[str, Sequence[str]]) -> ConfigFile:
    """Read the configuration file among the arguments of the command line.

    Args:
        words: Arguments of the command line.
        groups: Choices of every group.

    Raises:
        RequestError: If there are several files, or the file cannot be read, is no YAML or has a key twice.
    """
    named = [word for word in words if is_file(word)]
    if not named:
        return ConfigFile()
    if len(named) > 1:
        raise RequestError.of(" ".join(named), "only one file can be given", "put everything into one file")
    path = named[0]
    try:
        tree, lines = _load(Path(path).expanduser().read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError.of(path, f"cannot be read: {error}", "name a YAML file; `dist-ft init` writes one") from None
    if tree.keys() >= RUN_KEYS:
        return _repeat(tree, lines, path, groups)
    found = ConfigFile(lines=lines)
    for section, content in tree.items():
        _add(found, section, content, groups)
    found.given = {*found.choices, *found.values}
    return found


def _repeat(tree: dict[str, Any], lines: dict[str, str], path: str, groups: Mapping[str, Sequence[str]]) -> ConfigFile:
    """Read the `run.yaml` of a run, whose `config` is complete."""
    inside = {key.removeprefix("config."): line for key, line in lines.items() if key.startswith("config.")}
    found = ConfigFile(lines=inside, repeats=True)
    if not isinstance(tree["config"], dict) or not isinstance(tree["origins"], dict):
        raise RequestError.of(path, "is not the run.yaml of a run", "give a file that `dist-ft train` wrote")
    for section, content in tree["config"].items():
        _add(found, section, content, groups)
    found.values = {key: value for key, value in found.values.items() if key not in DERIVED or key in tree["origins"]}
    set_by_user = {key for key, origin in tree["origins"].items() if not str(origin).startswith((AUTO, LEFT_OUT))}
    found.given = set_by_user & {*found.choices, *found.values}
    return found


def _add(found: ConfigFile, section: str, content: Any, groups: Mapping[str, Sequence[str]]) -> None:
    """Add a section: its choice and its keys."""
    place = found.lines.get(section, section)
    if section in HYDRA_KEYS:
        way_out = "name a choice in its section (`method: lora`), and an experiment as `experiment: NAME`"
        found.problems.append(Problem(f"{section} ({place})", "is not used in this file", way_out))
    elif "." in section:
        above, _, rest = section.partition(".")
        found.problems.append(Problem(f"{section} ({place})", "keys have no dots", f"write {rest} below {above}:"))
    elif section not in groups and section not in keys.sections():
        found.values[section] = content
    elif content is None:
        found.problems.append(Problem(f"{section} ({place})", "is empty", "give it a value, or remove it"))
    elif isinstance(content, dict) and section in RunConfig.model_fields:
        _add_keys(found, section, dict(content), groups)
    elif isinstance(content, str) and section in groups:
        _choose(found, section, content, place, groups)
    else:
        kind = "a name" if section in groups else "keys"
        found.problems.append(Problem(f"{section} ({place})", f"must be {kind}", _form(section, groups)))


def _add_keys(found: ConfigFile, section: str, content: dict[str, Any], groups: Mapping[str, Sequence[str]]) -> None:
    name = content.pop(NAME, None) if section in groups else None
    if name is not None:
        _choose(found, section, str(name), found.lines.get(f"{section}.{NAME}", section), groups)
    elif choice := implied_choice(section, content):
        found.choices[section] = choice
    found.values.update({f"{section}.{key}": value for key, value in content.items()})


def implied_choice(section: str, content: Mapping[str, Any]) -> str | None:
    """Return the choice of a section without a name that has a model or data of its own; None for any other."""
    if section == "model" and content.get("name_or_path") is not None:
        return "hub"
    if section == "data" and content.get("mixture"):
        return "mixture"
    if section == "data" and (sources := content.get("train")) is not None:
        first = sources[0] if isinstance(sources, list) and sources else sources
        return expand(f"data={first}", {})[0].partition("=")[2] if "/" in str(first) else "jsonl"
    return None


def _choose(found: ConfigFile, group: str, value: str, place: str, groups: Mapping[str, Sequence[str]]) -> None:
    """Record the choice of a group, or the source that stands for one."""
    choice, *more = expand(f"{group}={value}", groups)
    name = choice.partition("=")[2]
    if name not in groups[group]:
        close = keys.nearest(name, groups[group], cutoff=0.6)
        hint = f"did you mean {close}? " if close else ""
        rule = f"{group} has no choice {name!r}"
        found.problems.append(Problem(f"{group} ({place})", rule, hint + _form(group, groups)))
        return
    found.choices[group] = name
    for word in more:
        key, _, source = word.partition("=")
        found.values[key] = source
        found.lines.setdefault(key, place)


def _form(section: str, groups: Mapping[str, Sequence[str]]) -> str:
    if section not in groups:
        return f"write `{section}: {{KEY: VALUE}}`"
    more = {"model": ", or a folder or OWNER/NAME of the Hub", "data": ", or a file, folder or OWNER/NAME"}
    return f"known: {', '.join(groups[section])}{more.get(section, '')}"


class YamlLoader(yaml.SafeLoader):
    """YAML loader that reads `1e-3` as a number, and `on`, `off` and `4:00:00` as texts, as YAML 1.2 does."""


_REPLACED = [f"tag:yaml.org,2002:{kind}" for kind in ("bool", "int", "float")]
YamlLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in found if tag not in _REPLACED]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
for tag, pattern, first in (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?(0b[01_]+|0[0-7_]*|[1-9][0-9_]*|0x[0-9a-fA-F_]+)", "-+0123456789"),
    ("float", r"[-+]?([0-9][0-9_]*\.[0-9_]*|\.[0-9][0-9_]*|[0-9][0-9_]*)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
):
    YamlLoader.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(f"^(?:{pattern})$"), list(first))


def _load(text: str, path: str) -> tuple[dict[str, Any], dict[str, str]]:
    """Parse YAML.

    Returns:
        The content, and the place of every dotted key.

    Raises:
        RequestError: If the text is no YAML, is not a mapping, or has a key twice.
    """
    # "./" keeps an own folder conf/ apart from the files of this package, whose origins begin with conf/.
    shown = f"./{path}" if path.startswith("conf/") else path
    loader = YamlLoader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return {}, {}
        if not isinstance(node, yaml.MappingNode):
            raise RequestError.of(f"{shown}:1", "is not a mapping", "write sections such as `model: smollm2`")
        lines: dict[str, str] = {}
        problems = []
        for key, line in _keys_of(node, ""):
            if key in lines:
                problems.append(Problem(f"{key} ({shown}:{line})", f"is already at {lines[key]}", "keep one of them"))
            lines[key] = f"{shown}:{line}"
        if problems:
            raise RequestError(*problems)
        tree = loader.construct_document(node)
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        rule = " ".join(part for part in (error.context, error.problem) if part)
        raise RequestError.of(f"{shown}:{line}", f"is not valid YAML: {rule}", "correct this line") from None
    except yaml.YAMLError as error:
        raise RequestError.of(shown, f"is not valid YAML: {error}", "correct the file") from None
    finally:
        loader.dispose()
    return {str(key): value for key, value in tree.items()}, lines


def _keys_of(node: yaml.MappingNode, prefix: str) -> Iterator[tuple[str, int]]:
    """Yield the dotted keys of a mapping at all depths, with their lines."""
    for key, value in node.value:
        dotted = f"{prefix}{key.value}"
        yield dotted, key.start_mark.line + 1
        if isinstance(value, yaml.MappingNode):
            yield from _keys_of(value, f"{dotted}.")
