"""Data that cannot be read as the request says is a problem with its place."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.unit.checks.found import MIXED, found

MIXTURES = {
    ("data=mixture", "data.train=null"): ("data.mixture", "contains no data set"),
    ("data=mixture", "data.mixture.a.train=rows.jsonl"): ("data.mixture", "data.train is also set"),
    ("data.train=null",): ("data.train", "is not set"),
    (*MIXED, "data.mixture.a.weight=2", "data.mixture.b.train=rows.jsonl"): ("data.mixture", "b has no weight"),
    (*MIXED, "data.mixture.a.format=text"): ("data.mixture.a.format", "is not supported with task=instruction"),
    (*MIXED, "data.mixture.a.template={prompt: '{x', completion: y}"): ("data.mixture.a.template", "is not a template"),
    (*MIXED, "data.mixture.a.template={prompt: a, completion: b}"): ("data.mixture.a.template", "uses no column"),
    (*MIXED, "data.mixture.a.template={prompt: '{text}'}"): ("data.mixture.a.template", "match no supported format"),
    ("data.template={question: '{text}', answer: '{text}'}",): ("data.template", "match no supported format"),
    ("data.template={prompt: '{text}', completion: '{text}'}", "data.columns={prompt: text}"): (
        "data.template",
        "prompt is also in data.columns",
    ),
    (*MIXED, "data.mixture.a.validation=nowhere/x.jsonl"): (
        "data.mixture.a.validation, nowhere/x.jsonl",
        "the file or folder does not exist",
    ),
}


LIMITED = {
    ("data.k_shot=4",): ("data.k_shot", "not supported with task=instruction: its rows have no label"),
    ("task=sequence_classification", "task.multi_label=true", "data.k_shot=4"): ("data.k_shot", "several labels"),
    ("data.folds=3", "data.validation=rows.jsonl"): ("data.folds", "data.validation is also set"),
    ("data.folds=3", "data.fold=3"): ("data.fold", "must be between 0 and 2"),
    (*MIXED, "data.mixture.a.k_shot=3"): ("data.mixture.a.k_shot", "not supported with task=instruction: its rows"),
    (*MIXED, "data.folds=3"): ("data.folds", "do not share labels or folds"),
}


@pytest.mark.parametrize("words", LIMITED, ids=lambda words: words[-1])
def test_limits_that_cannot_be_are_problems(words):
    where, rule = LIMITED[words]
    problems = found(*words)
    assert list(problems) == [where]
    assert rule in problems[where]
    assert found("task=sequence_classification", "data.k_shot=4") == {}


@pytest.mark.parametrize("words", MIXTURES, ids=lambda words: words[-1])
def test_a_mixture_that_cannot_be_is_a_problem(words):
    where, rule = MIXTURES[words]
    problems = found(*words)
    assert list(problems) == [where]
    assert rule in problems[where]
    assert found(*MIXED) == {}


def test_format_must_fit_the_task():
    assert "set task=causal_lm" in found("data.format=text")["data.format"]
    assert "set task=instruction" in found("task=causal_lm", "data.format=alpaca")["data.format"]


@pytest.mark.parametrize(
    ("name", "content", "rule"),
    [
        ("no.jsonl", None, "does not exist"),
        ("empty.jsonl", b"", "no rows"),
        ("bad.jsonl", b'{"text": "a"}\n{"text": \n', "is not valid JSON"),
        ("latin.jsonl", '{"text": "é"}\n'.encode("latin1"), "is not UTF-8"),
    ],
)
def test_data_is_opened(name, content, rule):
    if content is not None:
        Path(name).write_bytes(content)
    problems = found(f"data.validation=[rows.jsonl,{name}]")
    [(where, text)] = problems.items()
    assert where.startswith("data.validation, ")
    assert name in where
    assert rule in text


def test_template_file_must_exist():
    assert "the file none.jinja does not exist" in found("task.chat_template=none.jinja")["task.chat_template"]


def test_what_the_rows_determine_is_no_variable_of_the_template():
    problems = found("task.chat_template_kwargs={tools: [], enable_thinking: true}")
    assert problems == {"task.chat_template_kwargs": "tools of the chat template comes from the rows → remove it"}


def test_a_row_of_each_turn_learns_no_turn_twice():
    words = ["task.one_row_per_turn=true", "task.train_on=all"]
    assert "would train the turns before it again" in found(*words)["task.one_row_per_turn"]
