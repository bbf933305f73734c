"""Explain choices and keys: `dist-ft list [GROUP]` and `dist-ft help KEY`."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...config.run import RunConfig
from ...errors import Problem, RequestError
from ..composition import keys
from ..composition.compose import MISSING, ROOT, find_user_dir, list_groups
from ..composition.paths import CONF_DIR

WIDTH = 118


def list_lines(group: str | None, config_dir: str | None = None) -> Iterator[str]:
    """Yield the choices of a group, or of all groups, with the first sentence of each file.

    Raises:
        RequestError: If there is no such group.
    """
    user_dir = find_user_dir(config_dir)
    groups = list_groups(user_dir)
    if group is not None and group not in groups:
        close = keys.nearest(group, groups, cutoff=0.6)
        way_out = f"did you mean {close}?" if close else f"known: {', '.join(groups)}"
        raise RequestError.of(group, "is not a group", way_out)
    for name in [group] if group else groups:
        yield name
        for choice in groups[name]:
            own = user_dir / name / f"{choice}.yaml" if user_dir else None
            file = own if own is not None and own.is_file() else CONF_DIR / name / f"{choice}.yaml"
            yield from _entry(choice, _sentence(file))


def help_lines(key: str) -> Iterator[str]:
    """Yield type, default and meaning of a key, and the choices that have it; for a section, those of all its keys.

    Raises:
        RequestError: If there is no such key.
    """
    schema = RunConfig.model_json_schema()
    section, _, rest = key.partition(".")
    if section not in RunConfig.model_fields or (rest and section not in keys.sections()):
        _refuse(key)
    forms = _forms(section, schema)
    if not forms:
        yield from _key_lines(key, schema["properties"][section], schema, [], "")
        return
    found: dict[str, tuple[dict[str, Any], list[str]]] = {}  # key → its schema, and the choices that have it
    for names, record in forms:
        for name, content in record["properties"].items():
            if name != "name":
                found.setdefault(name, (content, []))[1].extend(names)
    if not rest:
        if groups := list_groups().get(section):
            yield f"{section}={'|'.join(groups)}"
        yield from (f"{section}.{name}" for name in found)
        return
    if rest not in found:
        _refuse(key)
    content, owners = found[rest]
    everywhere = len(owners) == sum(len(names) for names, _ in forms)
    yield from _key_lines(key, content, schema, [] if everywhere else owners, _default(section, rest, owners, content))


def _refuse(key: str) -> None:
    problem = keys.unknown_key(key, {}, key)
    raise RequestError(Problem(key, problem.rule, problem.way_out))


def _forms(section: str, schema: Mapping[str, Any]) -> list[tuple[list[str], dict[str, Any]]]:
    """Return the records of a section, each with the names of its choices."""
    content = schema["properties"][section]
    found = []
    for form in content.get("oneOf") or [content]:
        if "$ref" in form:
            record = schema["$defs"][form["$ref"].rpartition("/")[2]]
            name = record["properties"].get("name", {})
            found.append((name.get("enum") or [name.get("const", section)], record))
    return found


def _default(section: str, name: str, owners: Sequence[str], content: Mapping[str, Any]) -> str:
    """Return the default of a key: that of the files of its choices, or that of the schema."""
    shown = {}
    for owner in owners:
        value = _file_values(section, owner).get(name, content.get("default", MISSING))
        shown[owner] = "required" if value == MISSING else _shown(value)
    if len(set(shown.values())) == 1:
        return next(iter(shown.values()))
    return ", ".join(f"{value} ({section}={owner})" for owner, value in shown.items())


def _file_values(section: str, owner: str) -> dict[str, Any]:
    """Return the values in the file of a choice, or those of a section without choices in conf/train.yaml."""
    file = CONF_DIR / section / f"{owner}.yaml"
    values = yaml.safe_load((file if file.is_file() else CONF_DIR / f"{ROOT}.yaml").read_text(encoding="utf-8"))
    return dict(values if file.is_file() else values.get(section, {}))


def _key_lines(
    key: str, content: dict[str, Any], schema: Mapping[str, Any], owners: Sequence[str], default: str
) -> Iterator[str]:
    yield key
    yield from _entry("type", type_text(content, schema))
    if default:
        yield from _entry("default", default)
    if owners:
        section = key.partition(".")[0]
        yield from _entry("only with", ", ".join(f"{section}={name}" for name in owners))
    if text := content.get("description"):
        yield from textwrap.wrap(text, WIDTH, initial_indent="  ", subsequent_indent="  ")


def type_text(content: Mapping[str, Any], schema: Mapping[str, Any]) -> str:
    """Return the type of a key in words, from its JSON Schema."""
    if "$ref" in content:
        record = schema["$defs"][content["$ref"].rpartition("/")[2]]
        return f"keys: {', '.join(record['properties'])}"
    if "anyOf" in content:
        return " or ".join(dict.fromkeys(type_text(part, schema) for part in content["anyOf"]))
    if "const" in content or "enum" in content:
        return " or ".join(map(str, content.get("enum", [content.get("const")])))
    kind = str(content.get("type", "any value"))
    bounds = (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
    limits = [f"{sign} {content[bound]:g}" for bound, sign in bounds if bound in content and content[bound] < 2**53]
    if kind == "array":
        parts = content.get("prefixItems") or [content.get("items", {})]
        kind = f"list of {', '.join(dict.fromkeys(type_text(part, schema) for part in parts))}"
    if kind == "object" and isinstance(values := content.get("additionalProperties"), dict):
        kind = f"mapping of names to {type_text(values, schema)}"
    words = {"string": "text", "boolean": "true or false", "object": "mapping"}
    return " ".join([words.get(kind, kind), *([" and ".join(limits)] if limits else [])])


def _sentence(file: Path) -> str:
    """Return the comment on the first line of a YAML file, without the command that uses the file."""
    first = next(iter(file.read_text(encoding="utf-8").splitlines()), "")
    return re.sub(r"\s*`dist-ft [^`]*`\s*$", "", first.removeprefix("#").strip()) if first.startswith("#") else ""


def _entry(name: str, text: str) -> Iterator[str]:
    lines = textwrap.wrap(text, WIDTH - 28) or [""]
    yield f"  {name:<25} {lines[0]}".rstrip()
    yield from (f"{' ' * 28}{line}" for line in lines[1:])


def _shown(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
