"""Text templates: a row's columns put into texts of one's own, such as `Translate: {en}`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from string import Formatter
from typing import Any

from ...errors import Problem
from .faults import RowFault

_MISSING = object()


def fill(template: Mapping[str, str], columns: Mapping[str, str], row: Mapping[str, Any]) -> dict[str, Any]:
    """A row of the template's columns, and of those that `columns` renames; no others are left.

    `{NAME}` is the row's column NAME; `{A.B}` is B of the object in column A, where there is no column of the whole
    name. A text that is one such name alone keeps the value as it is, be it a number or a list.

    Raises:
        RowFault: the row has no such column, or what cannot stand in a text.
    """
    filled = {name: _fill(text, row) for name, text in template.items()}
    return {**{ours: _find(row, theirs) for ours, theirs in columns.items()}, **filled}


def template_problems(template: Mapping[str, str], key: str) -> Iterator[Problem]:
    """What is wrong with the texts themselves."""
    named = False
    for name, text in template.items():
        try:
            fields = [part[1:] for part in _parts(text) if part[1] is not None]
        except ValueError as error:
            yield Problem(key, f"{name}: {text!r} is no template ({error})", "write {COLUMN}, and {{ for a brace")
            return
        named = named or bool(fields)
        if any(not column or form or conversion for column, form, conversion in fields):
            rule = f"{name}: {text!r} has braces with something else than a column's name in them"
            yield Problem(key, rule, "write {COLUMN}, and {{ for a brace")
    if template and not named:
        yield Problem(key, "names no column, so that all rows are alike", "write {COLUMN} where a row's text belongs")


def _fill(text: str, row: Mapping[str, Any]) -> Any:
    parts = _parts(text)
    if len(parts) == 1 and not parts[0][0] and parts[0][1]:
        return _find(row, parts[0][1])
    pieces = []
    for literal, column, _, _ in parts:
        pieces.append(literal)
        if column is not None:
            value = _find(row, column)
            if not isinstance(value, str | int | float):
                kind = "null" if value is None else f"a {type(value).__name__}"
                raise RowFault(f"its {column}, which the template names, is {kind}", "correct the row or the template")
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
        raise RowFault(f"it has no column {name}, which the template names (it has {has})", "correct the template")
    return value


def _parts(text: str) -> list[tuple[str, str | None, str | None, str | None]]:
    return list(Formatter().parse(text))
