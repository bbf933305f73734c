"""Tests of text templates: columns are inserted, and missing columns and invalid templates are reported."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.fill import fill, template_problems

ROW = {
    "en": "Good day",
    "id": 7,
    "translation": {"sv": "God dag", "n": 1.5},
    "a.b": "dotted",
    "tags": ["x"],
    "no": None,
    "nan": float("nan"),
}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Translate: {en}", "Translate: Good day"),
        ("{en} {{id}} is {id}", "Good day {id} is 7"),
        ("{translation.sv}!", "God dag!"),
        ("{a.b}", "dotted"),
        ("{id}", 7),  # a single field keeps the type of the value
        ("{tags}", ["x"]),
        ("{no}", None),
        ("always", "always"),
        ("", ""),
    ],
)
def test_columns_are_put_in(text: str, expected: Any) -> None:
    assert fill({"prompt": text}, {}, ROW) == {"prompt": expected}


def test_only_what_is_named_is_left() -> None:
    assert fill({"text": "{en}."}, {"label": "id"}, ROW) == {"text": "Good day.", "label": 7}


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("Say {fr}", "column fr, used by the template, does not exist (columns: en, id,"),
        ("{fr}", "column fr, used by the template, does not exist"),
        ("{translation.fr}", "column translation.fr, used by the template, does not exist"),
        ("{en.sv}", "column en.sv, used by the template, does not exist"),
        ("Say {no}", "column no, used by the template, is null"),
        ("Say {tags}", "column tags, used by the template, is a list"),
        ("Say {nan}", "column nan, used by the template, is not a number"),
    ],
)
def test_what_a_row_lacks_is_a_fault_that_counts(text: str, cause: str) -> None:
    with pytest.raises(RowFault, match=cause.replace("(", r"\(")):
        fill({"prompt": text}, {}, ROW)


@pytest.mark.parametrize(
    ("text", "rule"),
    [
        ("{en", "is not a template"),
        ("en}", "is not a template"),
        ("{}", "something other than a column name"),
        ("{en!r}", "something other than a column name"),
        ("{en:>9}", "something other than a column name"),
        ("always", "uses no column"),
    ],
)
def test_a_text_that_is_no_template_is_a_problem(text: str, rule: str) -> None:
    (problem,) = template_problems({"prompt": text}, "data.template")
    assert rule in problem.rule and problem.where == "data.template"


def test_a_fixed_text_is_sound_beside_one_that_names_a_column() -> None:
    assert list(template_problems({"prompt": "Go on:", "completion": "{en}"}, "k")) == []
    assert list(template_problems({}, "k")) == []
    assert fill({"prompt": "{__class__}"}, {}, {"__class__": "a column"}) == {"prompt": "a column"}


def test_attributes_of_values_are_out_of_reach() -> None:
    with pytest.raises(RowFault):
        fill({"prompt": "{en.__class__}"}, {}, ROW)
