"""Tests of search spaces in Hydra's syntax."""

from __future__ import annotations

import math

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import list_groups
from dist_ft.launch.search.space import Axis, read_search


def axis(word: str) -> Axis:
    (found,) = read_search([word]).axes
    return found


@pytest.mark.parametrize(
    ("word", "values", "ordered"),
    [
        ("method.r=4,8", ["4", "8"], False),
        ("method.r=choice(8, 4)", ["8", "4"], False),
        ("method.r=shuffle(choice(8, 4))", ["4", "8"], False),
        ("method.r=range(4,17,4)", ["4", "8", "12", "16"], True),
        ("method.lora_dropout=range(0,0.4,0.1)", ["0.0", "0.1", "0.2", "0.3"], True),
        ("method.r=range(16,3,-4)", ["4", "8", "12", "16"], True),
        ("data.train=a.jsonl,'b c.jsonl'", ["a.jsonl", "'b c.jsonl'"], False),
        ("method.target_modules=[q_proj],[q_proj,v_proj]", ["[q_proj]", "[q_proj,v_proj]"], False),
        ("engine=glob(zero*)", [name for name in list_groups()["engine"] if name.startswith("zero")], False),
    ],
)
def test_lists_of_values(word: str, values: list[str], ordered: bool) -> None:
    found = axis(word)
    assert list(found.values) == values == found.samples == found.listed()
    assert found.ordered is ordered
    assert found.size == len(values)


def test_intervals() -> None:
    real = axis("optim.learning_rate=tag(log,interval(1e-5,1e-3))")
    assert (real.low, real.high, real.log, real.size) == (1e-5, 1e-3, True, math.inf)
    between = [float(value) for value in real.samples]
    assert between[:2] == [1e-5, 1e-3]
    assert 1e-5 < between[2] < 1e-3
    assert not float(axis("method.r=interval(4,16)").samples[2]).is_integer()
    whole = axis("method.r=int(interval(4,7))")
    assert (whole.size, whole.listed()) == (4, ["4", "5", "6", "7"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["method.r=choice(4,4)"], "has a value twice"),
        (["method.r=range(4,4)"], "has no value"),
        (["method.r=range(4,8,0)"], "has no value"),
        (["engine=glob(nothing*)"], "has no value"),
        (["method.r=4,8", "method.r=choice(16,32)"], "method.r has values already"),
        (["method.lora_dropout=interval(0.5,0.1)"], "its lower end is not below its upper end"),
        (["method.lora_dropout=tag(log,interval(0,0.1))"], "positive numbers only"),
        (["method.lora_dropout=tag(logarithm,interval(0.1,0.2))"], "the tag logarithm has no meaning"),
        (["method.r=tag(log,choice(4,8))"], "the tag log is for intervals"),
        (["method.lora_dropout=interval(0.1,0.2)", "sampler=grid"], "no end of values for sampler=grid"),
        (["method.r=choice(4"], "cannot be parsed"),
        (["method.r=4,8", "jobs=0"], "jobs: Input should be greater"),
    ],
)
def test_spaces_that_cannot_be_searched(words: list[str], message: str) -> None:
    with pytest.raises(RequestError, match=message):
        read_search(words)


def test_combinations_are_listed_unless_they_are_too_many() -> None:
    few = read_search(["method.r=4,8", "method.lora_alpha=1,2"]).combinations()
    assert few is not None
    assert list(few) == [("4", "1"), ("4", "2"), ("8", "1"), ("8", "2")]
    assert read_search(["method.r=4,8", "method.lora_dropout=interval(0.1,0.2)"]).combinations() is None
    assert read_search(["train.seed=range(0,200)", "method.r=range(1,100)"]).combinations() is None
