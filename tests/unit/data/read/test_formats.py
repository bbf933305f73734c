"""Tests of formats: rows are converted to canonical rows, and errors name the columns and a solution."""

from __future__ import annotations

import json
from typing import Any

import pytest

from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.read.formats import FORMATS, check_task, detect, normalise
from dist_ft.errors import Problem, RequestError

USER, ANSWER = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}
CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


@pytest.mark.parametrize(
    ("row", "format", "expected"),
    [
        ({"text": "a", "id": 1}, "text", {"text": "a"}),
        ({"prompt": "a", "completion": "b"}, "prompt_completion", {"prompt": "a", "completion": "b"}),
        (
            {"prompt": [USER], "completion": [ANSWER]},
            "prompt_completion",
            {"messages": [USER, ANSWER], "context": 1},
        ),
        ({"messages": [USER, ANSWER]}, "messages", {"messages": [USER, ANSWER]}),
        (
            {"messages": [{**USER, "name": None}, {**ANSWER, "tool_calls": None}], "tools": None},
            "messages",
            {"messages": [USER, ANSWER]},
        ),
        (
            {"messages": [{"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]}]},
            "messages",
            {"messages": [USER]},
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}]}],
             "tools": '[{"name": "f"}]'},
            "messages",
            {"messages": [USER, {"role": "assistant", "tool_calls": [{"id": "1", **CALL}], "content": ""}],
             "tools": [{"type": "function", "function": {"name": "f"}}]},
        ),
        (
            {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}], "system": "S"},
            "sharegpt",
            {"messages": [{"role": "system", "content": "S"}, USER, ANSWER]},
        ),
        (
            {"conversations": [
                {"from": "human", "value": "Hi"},
                {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
                {"from": "observation", "value": "[2]"},
                {"from": "gpt", "value": "Ho"}],
             "tools": "[]"},
            "sharegpt",
            {"messages": [
                USER, {"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "[2]"},
                ANSWER,
            ]},
        ),
        ({"instruction": "Hi", "input": "", "output": "Ho"}, "alpaca", {"messages": [USER, ANSWER]}),
        (
            {"instruction": "Hi", "context": "C", "response": "Ho"},
            "alpaca",
            {"messages": [{"role": "user", "content": "Hi\n\nC"}, ANSWER]},
        ),
        (
            {"instruction": "Hi", "input": None, "output": "Ho", "history": [["a", "b"]], "system": "S"},
            "alpaca",
            {"messages": [
                {"role": "system", "content": "S"}, {"role": "user", "content": "a"},
                {"role": "assistant", "content": "b"}, USER, ANSWER]},
        ),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, "tokens", {"input_ids": [1, 2], "labels": [-100, 2]}),
    ],
)  # fmt: skip
def test_rows_become_canonical(row: dict[str, Any], format: str, expected: dict[str, Any]) -> None:
    assert detect(row) == format
    assert normalise(row, "auto", {}) == expected == normalise(row, format, {})


def test_columns_rename_and_decide_the_format() -> None:
    row = {"question": "a", "answer": "b", "text": "c"}
    columns = {"prompt": "question", "completion": "answer"}
    assert detect(row) == "text"
    assert detect(row, columns) == "prompt_completion"
    assert normalise(row, "auto", columns) == {"prompt": "a", "completion": "b"}
    assert normalise({"a": "b"}, "text", {"text": "a"}) == {"text": "b"}


def problem(row: dict[str, Any], format: str = "auto", columns: dict[str, str] | None = None) -> Any:
    with pytest.raises((RequestError, InvalidRow)) as caught:
        normalise(row, format, columns or {})
    if isinstance(caught.value, InvalidRow):
        return Problem("row", str(caught.value), caught.value.way_out)
    return caught.value.problems[0]


@pytest.mark.parametrize(
    ("row", "format", "columns", "rule", "way_out"),
    [
        ({"question": 1, "answer": 2}, "auto", {}, "answer match no", "{prompt: question, completion: answer}"),
        ({"content": "x"}, "auto", {}, "columns content match no", "data.columns={text: content}"),
        ({"promt": "a", "completion": "b"}, "prompt_completion", {}, "requires prompt", "{prompt: promt"),
        ({"conversations": []}, "messages", {}, "messages; the columns are conversations", "data.format=sharegpt"),
        ({"text": "a"}, "text", {"text": "body"}, "has no column body; its columns are text", "data.columns"),
        ({"text": "a"}, "text", {"prompt": "text"}, "format text has no column prompt", "use its columns: text"),
        ({"text": 3}, "text", {}, "text is not a string (such as 3)", "row"),
        ({"prompt": "a", "completion": None}, "auto", {}, "completion is not a string (such as None)", "row"),
        ({"prompt": [USER], "completion": "x"}, "auto", {}, "both", "row"),
        ({"messages": [{"from": "human", "value": "x"}]}, "auto", {}, "message 1 has from, value", "sharegpt"),
        ({"messages": [{"role": "human", "content": "x"}]}, "auto", {}, "the role 'human'", "assistant"),
        ({"messages": [{"role": "user", "content": None}]}, "auto", {}, "neither content nor tool_calls", "row"),
        ({"messages": []}, "auto", {}, "at least one message", "row"),
        ({"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "auto", {}, "not a string", "row"),
        ({"conversations": [{"from": "bot", "value": "x"}]}, "auto", {}, "turn 1 is from 'bot'", "gpt"),
        ({"conversations": [{"from": "function_call", "value": "{"}]}, "auto", {}, "invalid JSON", "row"),
        ({"conversations": [{"role": "user", "content": "x"}]}, "auto", {}, "not from and value", "messages: conv"),
        ({"input_ids": [1], "labels": [1, 2]}, "auto", {}, "1 input_ids but 2 labels", "label for each"),
        ({"input_ids": [-1], "labels": [1]}, "auto", {}, "negative", "row"),
        ({"input_ids": [1], "labels": [-1]}, "auto", {}, "neither a token id nor -100", "row"),
        ({"input_ids": [1.0], "labels": [1]}, "auto", {}, "integers", "row"),
    ],
)  # fmt: skip
def test_misfits_name_what_is_there_and_the_way_out(
    row: dict[str, Any], format: str, columns: dict[str, str], rule: str, way_out: str
) -> None:
    found = problem(row, format, columns)
    assert rule in found.rule and way_out in found.way_out
    assert found.where in ("row", "data.columns")


def test_tasks_take_their_own_formats() -> None:
    for task in ("causal_lm", "instruction"):
        for name, form in FORMATS.items():
            if task in form.tasks:
                check_task(name, task)
            else:
                with pytest.raises(InvalidRow, match="is not supported with task"):
                    check_task(name, task)
    assert [name for name, form in FORMATS.items() if "causal_lm" in form.tasks] == ["tokens", "text"]


@pytest.mark.parametrize("name", ["dolly", "oasst_chat", "toolcall_sharegpt"])
def test_real_sets_are_understood(shared: Any, name: str) -> None:
    path = shared / "data" / name / "validation.jsonl"
    with path.open(encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    canonical = [normalise(row, "auto", {}) for row in rows]
    assert all(row["messages"][-1]["role"] == "assistant" for row in canonical)
    calls = sum("tool_calls" in message for row in canonical for message in row["messages"])
    spoken = sum(turn["from"] == "function_call" for row in rows for turn in row.get("conversations", ()))
    assert calls == spoken and (calls > 0) == (name == "toolcall_sharegpt")


@pytest.mark.parametrize(
    ("row", "format"),
    [
        ({"prompt": "a", "completion": "b"}, "prompt_completion"),
        ({"prompt": [USER], "completion": [ANSWER]}, "prompt_completion"),
        ({"messages": [USER, ANSWER]}, "messages"),
        ({"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]}, "sharegpt"),
        ({"instruction": "Hi", "output": "Ho"}, "alpaca"),
    ],
)
@pytest.mark.parametrize("column", ["label", "kto_tag"])
def test_an_answer_that_is_marked_as_bad_is_not_learned(row: dict[str, Any], format: str, column: str) -> None:
    accepted = normalise(row, format, {})
    assert normalise({**row, column: True}, format, {}) == accepted
    for false in (False, "false", "False"):  # the strings are those of CSV files
        with pytest.raises(InvalidRow, match=f"{column} is false, which marks the answer as one not to learn"):
            normalise({**row, column: false}, format, {})


def test_functions_are_tools() -> None:
    functions = [{"name": "f", "parameters": {}}]
    row = {"messages": [USER, ANSWER], "functions": functions}
    expected = normalise({"messages": [USER, ANSWER], "tools": functions}, "messages", {})
    assert normalise(row, "auto", {}) == expected and expected["tools"][0]["function"] == functions[0]
    assert normalise({**row, "tools": None}, "auto", {}) == expected
    with pytest.raises(InvalidRow, match="both tools and functions"):
        normalise({**row, "tools": functions}, "auto", {})


def test_function_calls_of_the_old_form_are_tool_calls() -> None:
    call = {"name": "f", "arguments": '{"x": 1}'}
    old = [USER, {"role": "assistant", "content": None, "function_call": call}, {"role": "function", "content": "2"}]
    new = [
        USER,
        {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": call}]},
        {"role": "tool", "content": "2"},
    ]
    expected = normalise({"messages": new}, "messages", {})
    assert normalise({"messages": old}, "messages", {}) == expected
    assert expected["messages"][1]["tool_calls"] == [CALL]
    spoken = [{**new[1], "content": "Let me see."}, {**old[1], "content": "Let me see."}]
    assert normalise({"messages": spoken[1:]}, "messages", {}) == normalise({"messages": spoken[:1]}, "messages", {})


def test_null_arguments_are_arguments() -> None:
    arguments = {"city": "Oslo", "unit": None, "range": {"to": None}}
    call = {"id": None, "function": {"name": "f", "arguments": arguments}}
    row = {"messages": [USER, {"role": "assistant", "content": None, "tool_calls": [call]}]}
    (found,) = normalise(row, "messages", {})["messages"][1]["tool_calls"]
    assert found == {"type": "function", "function": {"name": "f", "arguments": arguments}}


@pytest.mark.parametrize(
    ("given", "label"),
    [
        (True, "true"),
        (False, "false"),
        (2.0, 2),
        (float("nan"), None),
        (None, None),
        ("a", "a"),
        ([1.0, True], [1, "true"]),
    ],
)
def test_labels_are_integers_or_strings(given: Any, label: Any) -> None:
    found = normalise({"text": "x", "label": given}, "labelled", {})["label"]
    assert found == label and type(found) is type(label)
    if not isinstance(given, list):
        assert normalise({"tokens": ["x"], "tags": [given]}, "tagged", {})["tags"] == [label]


def test_scores_are_no_labels() -> None:
    with pytest.raises(InvalidRow, match=r"neither an integer nor a string \(such as 0.5\)"):
        normalise({"text": "x", "label": 0.5}, "labelled", {})
