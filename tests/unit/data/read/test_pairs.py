"""Tests of preference pairs: every supported form is converted to a prompt and two answers."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.read.formats import detect, normalise


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def said(text: str) -> dict[str, Any]:
    return {"role": "assistant", "content": text}


TALK = [user("你好?"), said("Hi."), user("Weather?")]


def read(row: dict[str, Any]) -> dict[str, Any]:
    return normalise(row, "auto", {})


SUN, RAIN = [said("Sun")], [said("雨")]
WEATHER = [user("Weather?")]
SURE = [*SUN, user("Sure?"), said("Yes")]
TEXT = "\n\nHuman: why?\n\nAssistant:"


@pytest.mark.parametrize(
    ("row", "prompt", "chosen", "rejected"),
    [
        ({"prompt": "a ", "chosen": "b", "rejected": "c"}, "a ", "b", "c"),
        ({"chosen": TEXT + " yes", "rejected": TEXT + " yep"}, TEXT, " yes", " yep"),
        ({"prompt": TALK, "chosen": SUN, "rejected": RAIN}, TALK, SUN, RAIN),
        ({"prompt": TALK, "chosen": "Sun", "rejected": "雨"}, TALK, SUN, RAIN),
        ({"prompt": TALK, "chosen": SUN[0], "rejected": RAIN[0]}, TALK, SUN, RAIN),
        ({"prompt": "Weather?", "chosen": SUN, "rejected": RAIN}, WEATHER, SUN, RAIN),
        ({"chosen": [*TALK, *SUN], "rejected": [*TALK, *RAIN]}, TALK, SUN, RAIN),
        ({"prompt": "Weather?", "chosen": [*TALK, *SUN], "rejected": [*TALK, *RAIN]}, TALK, SUN, RAIN),
        ({"prompt": TALK, "chosen": [*TALK, *SUN], "rejected": [*TALK, *RAIN]}, TALK, SUN, RAIN),
        ({"prompt": TALK, "chosen": SURE, "rejected": SUN}, TALK, SURE, SUN),
        ({"chosen": [*TALK, *SUN], "rejected": [*TALK, *SUN]}, TALK, SUN, SUN),
        ({"prompt": TALK, "chosen": [], "rejected": RAIN}, TALK, [], RAIN),
        ({"chosen": [*WEATHER, *SUN], "rejected": [*TALK, *SUN]}, [], [*WEATHER, *SUN], [*TALK, *SUN]),
    ],
)
def test_every_shape(row: dict[str, Any], prompt: Any, chosen: Any, rejected: Any) -> None:
    assert detect(row, task="preference") == "pairs"
    assert read(row) == {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def test_a_shared_prompt_is_what_trl_takes_for_one() -> None:
    data_utils = pytest.importorskip("trl.data_utils")
    row = {"chosen": [*TALK, said("Sun")], "rejected": [*TALK, said("雨")]}
    assert read(row) == data_utils.extract_prompt(row)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": 3, "chosen": "a", "rejected": "b"},
        {"prompt": "p", "chosen": "a", "rejected": [said("b")]},
        {"prompt": "p", "chosen": None, "rejected": "b"},
        {"prompt": TALK, "chosen": [{"content": "no role"}], "rejected": [said("b")]},
    ],
)
def test_other_values_are_named(row: dict[str, Any]) -> None:
    with pytest.raises(InvalidRow, match="format pairs: "):
        read(row)


def test_columns_of_other_names_and_tools() -> None:
    tools = [{"name": "look", "parameters": {}}]
    row = {"question": "p", "yes": "a", "no": "b", "tools": tools}
    found = normalise(row, "pairs", {"prompt": "question", "chosen": "yes", "rejected": "no"})
    assert found == {
        "prompt": "p",
        "chosen": "a",
        "rejected": "b",
        "tools": [{"type": "function", "function": tools[0]}],
    }
