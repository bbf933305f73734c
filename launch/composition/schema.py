"""The JSON Schema of a configuration file: what `file.py` reads, for editors."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from ...config.run import RunConfig
from . import keys

DIALECT = "https://json-schema.org/draft/2020-12/schema"
SOURCES = {
    "model": "A choice, or a folder or OWNER/NAME of the Hub.",
    "data": "A choice, or a file, a folder, a glob pattern or OWNER/NAME of the Hub.",
}


def file_schema(groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    """Return the JSON Schema of a configuration file.

    Nothing is required, because the files of `conf/` have defaults. A section is the name of a choice or has the keys
    of a choice, with its name or without.

    Args:
        groups: Choices of every group.
    """
    whole = RunConfig.model_json_schema()
    definitions = {name: _loose(record) for name, record in whole["$defs"].items()}
    definitions.update({name: whole["$defs"][name] for name in ("DataSet", "AugmentConfig")})
    for section in keys.sections():
        form = whole["properties"][section].get("$ref", "").rpartition("/")[2]
        if section in groups and form:  # groups whose choices have no name in the schema
            definitions[form]["properties"].setdefault("name", {"type": "string", "examples": [*groups[section]]})
    properties = {
        "experiment": {"enum": [*groups["experiment"]], "description": "Experiment that the file is based on."}
    }
    for section, content in whole["properties"].items():
        properties[section] = _section(section, content, groups) if section in keys.sections() else content
    return {
        "$schema": DIALECT,
        "title": "Configuration of a run",
        "type": "object",
        "properties": properties,
        "additionalProperties": False,
        "$defs": definitions,
    }


def _section(section: str, content: dict[str, Any], groups: Mapping[str, Sequence[str]]) -> dict[str, Any]:
    forms: list[dict[str, Any]] = content.get("oneOf") or [{"$ref": content["$ref"]}]
    if section not in groups:
        return forms[0]
    choices: dict[str, Any] = {"enum": [*groups[section]]}
    if section in SOURCES:
        choices = {"anyOf": [choices, {"type": "string"}], "description": SOURCES[section]}
    return {"anyOf": [choices, *forms]}


def _loose(record: dict[str, Any]) -> dict[str, Any]:
    """Return a record none of whose keys is required."""
    loose = copy.deepcopy(record)
    loose.pop("required", None)
    return loose
