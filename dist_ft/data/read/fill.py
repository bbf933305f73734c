"""Text templates that insert a row's columns, such as `Translate: {en}`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from ...errors import Problem
from .faults import InvalidRow

_MISSING = object()


def fill(template: Mapping[str, str], columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """Build a row with only the columns of `template` and the columns renamed by `columns`.

    `{NAME}` is replaced by column NAME of the row. `{A.B}` is replaced by key B of the object in column A, unless the
    row has a column named `A.B`. A template that consists of a single field returns the value without converting it
    to a string.

    Args:
        template: Output column -> text with `{COLUMN}` fields.
        columns: Output column -> column of the row.
        row: Raw row.

    Raises:
        InvalidRow: The row lacks a column, or its value cannot be inserted into text.
    """
    filled = {name: _fill(text, row) for name, text in template.items()}
    return {**{ours: _find(row, theirs) for ours, theirs in columns.items()}, **filled}


def template_problems(template: Mapping[str, str], key: str) -> Iterator[Problem]:
    """Yield the problems of the template that can be found without data."""
    named = False
    for name, text in template.items():
        try:
            fields = [part[1:] for part in _parts(text) if part[1] is not None]
        except ValueError as error:
            yield Problem(key, f"{name}: {text!r} is not a template ({error})", "write {COLUMN}, and {{ for a brace")
            return
        named = named or bool(fields)
        if any(not column or form or conversion for column, form, conversion in fields):
            rule = f"{name}: {text!r} has braces that contain something other than a column name"
            yield Problem(key, rule, "write {COLUMN}, and {{ for a brace")
    if template and not named:
        yield Problem(key, "uses no column, so all rows would be the same", "insert columns of the data with {COLUMN}")


def _fill(text: str, row: Mapping[str, Any]) -> Any:
    parts = _parts(text)
    if len(parts) == 1 and not parts[0][0] and parts[0][1]:
        return _find(row, parts[0][1])
    pieces = []
    for literal, column, _, _ in parts:
        pieces.append(literal)
        if column is not None:
            value = _find(row, column)
            is_number = isinstance(value, int) or (isinstance(value, float) and math.isfinite(value))
            if not isinstance(value, str) and not is_number:
                names = {type(None): "null", float: "not a number"}
                kind = names.get(type(value), f"a {type(value).__name__}")
                raise InvalidRow(f"column {column}, used by the template, is {kind}", "correct the row or the template")
            pieces.append(str(value))
    return "".join(pieces)


def _find(row: Mapping[str, Any], name: str) -> Any:
    value: Any = row.get(name, _MISSING)
    if value is not _MISSING:
        return value
    value = row
    for part in name.split("."):
        value = value.get(part, _MISSING) if isinstance(value, Mapping) else _MISSING
    if value is _MISSING:
        has = ", ".join(str(column) for column in row)
        raise InvalidRow(
            f"column {name}, used by the template, does not exist (columns: {has})", "correct the template"
        )
    return value


def _parts(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(Formatter().parse(text))
