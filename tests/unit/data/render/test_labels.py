"""Tests of label names and ids: determined from the training split and shared by all splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.run import RunConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.labels import describe_alike, find_labels, number_of
from dist_ft.errors import RequestError
from dist_ft.task.sequence_classification import SequenceClassification


def config_of(folder: Path, rows: list[dict[str, Any]], **task: Any) -> RunConfig:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return RunConfig.model_validate(
        {
            "run_name": "r",
            "output_dir": "runs/r",
            "model": {"dtype": "float32", "name_or_path": "m"},
            "task": {"name": "sequence_classification", **task},
            "data": {"train": str(path)},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {},
            "track": {},
            "launch": {"name": "local"},
        }
    )


def found(
    folder: Path, labels: list[Any], texts: list[str] | None = None, names: list[str] | None = None, **task: Any
) -> tuple[Any, ...]:
    named = texts or [None] * len(labels)
    rows = [
        {"text": "x", "label": label, **({"label_text": text} if text else {})}
        for label, text in zip(labels, named, strict=True)
    ]
    return find_labels(config_of(folder, rows, labels=names, **task), SequenceClassification.labels_of)


def test_text_is_in_alphabetical_order_and_counted(tmp_path: Path) -> None:
    assert found(tmp_path, ["b", "a", "b", "čaj"]) == (("a", "b", "čaj"), (1, 2, 1), 4)


def test_numbers_are_named_by_label_text_where_each_has_one(tmp_path: Path) -> None:
    assert found(tmp_path, [1, 0, 1], ["good", "bad", "good"])[:2] == (("bad", "good"), (1, 2))
    assert found(tmp_path, [1, 0, 1], ["good", "bad", "great"])[0] == ("0", "1")
    assert found(tmp_path, [10, 2, 10])[:2] == (("2", "10"), (1, 2))


def test_an_unknown_integer_is_not_taken_for_an_id() -> None:
    names = ("1", "2", "3")  # of training rows with these integers
    assert [number_of(value, names) for value in (1, 2, 3, "3")] == [0, 1, 2, 2]
    for value in (0, 4, -2):
        with pytest.raises(RowFault, match="not one of the labels"):
            number_of(value, names)


def test_minus_one_is_a_label_where_the_names_say_so(tmp_path: Path) -> None:
    names = ["-1", "0", "1"]
    assert found(tmp_path, [-1, 1, 0, -1], names=names) == (tuple(names), (2, 1, 1), 4)
    assert [number_of(value, names) for value in (-1, 0, 1)] == [0, 1, 2]


def test_booleans_and_whole_numbers_are_labels(tmp_path: Path) -> None:
    assert found(tmp_path, [True, False, True])[:2] == (("false", "true"), (1, 2))
    assert found(tmp_path, [2.0, 1.0, float("nan")])[:2] == (("1", "2"), (1, 1))


@pytest.mark.parametrize(
    ("labels", "alike"),
    [
        (("good", "bad"), None),
        (("1", "2", "10"), None),
        (("Good", "good", "bad"), "'Good' and 'good'"),
        (("very_good", "very good ", "Very-Good"), "'very_good' and 'very good ' and 'Very-Good'"),
        (("1", "1.0", "2"), "'1' and '1.0'"),
        (("ﬁne", "fine"), "'ﬁne' and 'fine'"),
    ],
)
def test_labels_that_are_almost_the_same_are_named(labels: tuple[str, ...], alike: str | None) -> None:
    said = describe_alike(labels)
    assert said is None if alike is None else alike in str(said)


def test_rows_without_a_label_are_no_label(tmp_path: Path) -> None:
    assert found(tmp_path, [1, 0, None, -1, ""])[:2] == (("0", "1"), (1, 1))


def test_lists_of_labels_are_counted_one_by_one(tmp_path: Path) -> None:
    assert found(tmp_path, [["a", "b"], ["b"], []], multi_label=True) == (("a", "b"), (1, 2), 3)


def test_names_that_are_given_keep_their_order(tmp_path: Path) -> None:
    assert found(tmp_path, ["a", "b"], names=["b", "a", "c"])[:2] == (("b", "a", "c"), (1, 1, 0))


@pytest.mark.parametrize(("labels", "said"), [(["a", "a"], "1 label found"), (["a", 1], "some labels are integers")])
def test_nothing_to_tell_apart(tmp_path: Path, labels: list[Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        found(tmp_path, labels)


def test_a_labels_number() -> None:
    assert [number_of(value, ("2", "10")) for value in (2, "10", 10)] == [0, 1, 1]
    assert number_of(1, ("bad", "good")) == 1 and number_of("bad", ("bad", "good")) == 0
    for value, said in (
        (None, "missing"),
        (-1, "the label is -1"),
        ("", "missing"),
        ("ugly", "not one of"),
        (2, "not one of"),
    ):
        with pytest.raises(RowFault, match=said):
            number_of(value, ("bad", "good"))
