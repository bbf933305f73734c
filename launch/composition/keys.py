"""Dotted keys of a configuration: the valid keys, the closest match to a typo, and problems found by the schema."""

from __future__ import annotations

import difflib
import typing
from collections.abc import Collection, Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from ...config.data import AugmentConfig, DataSet
from ...config.run import RunConfig
from ...errors import Problem
from .synonyms import find_synonym

Tree = dict[str, Any]
MIXTURE = "data.mixture"


def members(annotation: Any) -> list[type[BaseModel]]:
    """Return the pydantic models in a type annotation: one, those of a union, or none for a plain value."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    found = [members(part) for part in typing.get_args(annotation) if not isinstance(part, str | FieldInfo)]
    return [record for group in found for record in group]


def names(record: type[BaseModel]) -> tuple[str, ...]:
    """Return the literal values of the `name` field of a model, which select it in its group."""
    field = record.model_fields.get("name")
    if field is None or typing.get_origin(field.annotation) is not Literal:
        return ()
    return typing.get_args(field.annotation)


def sections() -> list[str]:
    """Return the names of the sections: the top-level keys with keys of their own."""
    return [section for section, field in RunConfig.model_fields.items() if members(field.annotation)]


def chosen(config: Mapping[str, Any]) -> dict[str, type[BaseModel] | None]:
    """Return the pydantic model of each section: None for a top-level value, the first one if the choice is unknown."""
    found: dict[str, type[BaseModel] | None] = {}
    for section, field in RunConfig.model_fields.items():
        records = members(field.annotation)
        name = config[section].get("name") if isinstance(config.get(section), dict) else None
        matching = [record for record in records if name in names(record)]
        found[section] = next(iter(matching or records), None)
    return found


def valid_keys(config: Mapping[str, Any]) -> list[str]:
    """Return all dotted keys that are valid for the choices in `config`."""
    keys = []
    for section, record in chosen(config).items():
        keys += [section] if record is None else [f"{section}.{key}" for key in record.model_fields]
    return keys


def nearest(word: str, known: Iterable[str], *, cutoff: float = 0.76) -> str | None:
    """Return the closest match to `word`; None if no name is similar.

    Only last parts are compared, because names with the same section look similar whatever they mean. Of equally
    similar keys, one of the same section comes first.
    """
    section, _, last = word.rpartition(".")

    def similarity(key: str) -> tuple[float, bool, str]:
        above, _, name = key.rpartition(".")
        return difflib.SequenceMatcher(None, last, name).ratio(), above == section, key

    best = max(known, key=similarity, default=None)
    return best if best is not None and similarity(best)[0] >= cutoff else None


def unknown_key(key: str, config: Mapping[str, Any], where: str) -> Problem:
    """Return the problem of an unknown key, naming the closest valid key or the choice that it belongs to."""
    above = key.rpartition(".")[0]
    of_augment = above.startswith("data.") and above.endswith(".augment")
    if of_augment or key.startswith(f"{MIXTURE}."):
        here = list((AugmentConfig if of_augment else DataSet).model_fields)
        close = nearest(key, [f"{above}.{name}" for name in here])
        way_out = f"did you mean {close}?" if close else f"valid keys: {', '.join(here)}"
        return Problem(where, "unknown key", way_out)
    section, _, rest = key.partition(".")
    head = rest.partition(".")[0]
    if section in RunConfig.model_fields and head:
        records = members(RunConfig.model_fields[section].annotation)
        owners = [name for record in records if head in record.model_fields for name in names(record)]
        if owners:
            choices = " or ".join(f"{section}={name}" for name in owners)
            now = config.get(section)
            current = f"{section}={now['name']}" if isinstance(now, dict) and "name" in now else "the current choice"
            rule = f"this key belongs to {choices} and is not supported with {current}"
            return Problem(where, rule, f"remove it, or set {choices}")
    meant, reason = find_synonym(key)
    if reason is not None:
        return Problem(where, "there is no such key", reason)
    known = [*RunConfig.model_fields, *valid_keys(config)]
    close = meant or nearest(key, known) or nearest(key, every_key())
    if close is not None:
        return Problem(where, "unknown key", f"did you mean {close}?{_owners(close, known)}")
    record = chosen(config).get(section)
    own = [f"{section}.{name}" for name in record.model_fields if name != "name"] if record else []
    options = own or list(RunConfig.model_fields)
    return Problem(where, "unknown key", f"valid keys: {', '.join(options)}")


def every_key() -> list[str]:
    """Return the keys of all choices of all sections."""
    found = {section: members(field.annotation) for section, field in RunConfig.model_fields.items()}
    keys = [f"{section}.{key}" for section, records in found.items() for r in records for key in r.model_fields]
    return list(dict.fromkeys(keys))


def _owners(key: str, known: Collection[str]) -> str:
    """Return which choices have a key that the current choices do not have; empty for a known key."""
    section, _, rest = key.partition(".")
    if key in known:
        return ""
    records = members(RunConfig.model_fields[section].annotation)
    owners = [name for record in records if rest in record.model_fields for name in names(record)]
    return f" It belongs to {' or '.join(f'{section}={name}' for name in owners)}"


def set_value(tree: Tree, key: str, value: Any) -> str | None:
    """Set a dotted key in nested dictionaries.

    Returns:
        None if the key was set, or the dotted prefix that already has a plain value.
    """
    *path, last = key.split(".")
    for depth, part in enumerate(path):
        below = tree.setdefault(part, {})
        if not isinstance(below, dict):
            return ".".join(path[: depth + 1])
        tree = below
    tree[last] = value
    return None


def get_value(tree: Mapping[str, Any], key: str) -> Any:
    """Return the value of a dotted key, or None if it is not set."""
    value: Any = tree
    for part in key.split("."):
        if not isinstance(value, dict) or part not in value:
            return None
        value = value[part]
    return value


def leaves(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten sections to dotted keys; a dictionary that is the value of one schema field is kept whole."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        dotted = f"{prefix}{key}"
        if isinstance(value, dict) and not prefix and dotted in RunConfig.model_fields:
            found.update(leaves(value, f"{dotted}."))
        else:
            found[dotted] = value
    return found


def schema_problems(error: ValidationError, config: Mapping[str, Any], origins: Mapping[str, str]) -> list[Problem]:
    """Convert pydantic errors to one problem for each key, with its origin, its value and the allowed values."""
    found: dict[str, list[Any]] = {}
    for item in error.errors(include_url=False):
        found.setdefault(_field_of(item["loc"]), []).append(item)
    problems = []
    for key, items in found.items():
        origin = origins.get(key) or (origins.get(MIXTURE) if key.startswith(MIXTURE) else None)
        where = f"{key} ({origin})" if origin else key
        if items[0]["type"] == "extra_forbidden":
            problems.append(unknown_key(key, config, where))
        elif items[0]["type"] == "missing":
            problems.append(missing_key(key))
        elif items[0]["type"].startswith("union_tag"):
            options = [name for record in members(RunConfig.model_fields[key].annotation) for name in names(record)]
            problems.append(Problem(where, "unknown choice", f"set one of {', '.join(options)}"))
        else:
            problems.append(_wrong_value(key, where, items))
    return problems


def missing_key(key: str) -> Problem:
    """Return the problem of a required key without a value."""
    return Problem(key, "is required", f"set {key}=VALUE")


def _field_of(loc: tuple[int | str, ...]) -> str:
    """Return the dotted key of a pydantic error location, without union tags and positions inside a value."""
    section, *rest = [str(part) for part in loc]
    records = members(RunConfig.model_fields[section].annotation) if section in RunConfig.model_fields else []
    if len(records) > 1 and rest and any(rest[0] in names(record) for record in records):
        rest = rest[1:]
    depth = 3 if f"{section}.{rest[0] if rest else ''}" == MIXTURE else 1  # data.mixture.NAME.KEY
    if section == "data" and rest[depth - 1 : depth] == ["augment"]:  # `augment` has keys as well
        depth += 1
    return ".".join([section, *rest[:depth]]) if records else section


def _wrong_value(key: str, where: str, items: list[Any]) -> Problem:
    """Return the problem of a value with the wrong type or out of range."""
    value = items[0]["input"]
    rules, options = [], []
    for item in items:
        if item["type"] == "literal_error":
            options += [word.strip().strip("'") for word in item["ctx"]["expected"].replace(" or ", ", ").split(",")]
        else:
            rules.append(_rule_of(item["msg"]))
    if options:
        rules.append("must be one of " + ", ".join(options))
    close = difflib.get_close_matches(str(value), options, n=1)
    rule = " or ".join(dict.fromkeys(rules))
    if key == "run_name":
        rule, close = "must be at most 120 letters, digits, `.`, `_` or `-`, and start with a letter or digit", []
    way_out = f"did you mean {key}={close[0]}?" if close else f"set a valid value: {key}=VALUE"
    return Problem(where, f"{value!r} is invalid: it {rule}", way_out)


def _rule_of(message: str) -> str:
    """Turn a pydantic message into the end of a sentence that starts with `it`."""
    if message.startswith("Input should be "):
        return "must be " + message.removeprefix("Input should be ").replace(
            ", unable to parse string as an integer", ""
        )
    return "is rejected: " + message
