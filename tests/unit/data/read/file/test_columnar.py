"""Columns of Parquet and Arrow files: class names, doubled names, and nulls that only other rows explain."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from dist_ft.data.read.formats import normalise
from dist_ft.data.read.rows import read_rows
from dist_ft.errors import RequestError


def read(path: Path) -> list[Any]:
    return [row for _, row in read_rows(str(path))]


def test_class_numbers_in_a_file_of_datasets_become_their_names(tmp_path: Path) -> None:
    classes = datasets.ClassLabel(names=["neg", "pos"])
    features = datasets.Features({"text": datasets.Value("string"), "label": classes, "tags": datasets.List(classes)})
    rows = [{"text": "a", "label": 1, "tags": [0, 1]}, {"text": "b", "label": -1, "tags": []}]
    datasets.Dataset.from_list(rows, features=features).to_parquet(tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [
        {"text": "a", "label": "pos", "tags": ["neg", "pos"]},
        {"text": "b", "label": None, "tags": []},
    ]


def test_columns_and_keys_of_the_same_name_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table([[1], [2], [3]], names=["a", "b", "a"]), path)
    with pytest.raises(RequestError, match="duplicate column names: a"):
        read(path)
    inner = pyarrow.StructArray.from_arrays([pyarrow.array([1]), pyarrow.array([2])], names=["x", "x"])
    schema = pyarrow.schema([("a", pyarrow.list_(inner.type))])
    column = pyarrow.ListArray.from_arrays([0, 1], inner)
    with pyarrow.ipc.new_file(tmp_path / "a.arrow", schema) as writer:
        writer.write_table(pyarrow.table([column], schema=schema))
    with pytest.raises(RequestError, match="duplicate column names: x"):
        read(tmp_path / "a.arrow")


def test_arguments_of_other_calls_are_no_arguments(tmp_path: Path) -> None:
    """Parquet stores the arguments of all functions for every call, as null where a call has them not."""
    arguments: list[dict[str, Any]] = [{"city": "Oslo"}, {"unit": "C"}]
    turns = [
        [
            {"role": "user", "content": "Hi"},
            {"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": given}}]},
        ]
        for given in arguments
    ]
    table = pyarrow.Table.from_pylist([{"messages": messages, "note": None} for messages in turns])
    stored = table.to_pylist()[0]["messages"][1]["tool_calls"][0]["function"]["arguments"]
    assert stored == {"city": "Oslo", "unit": None}
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    canonical = [normalise(row, "messages", {}) for row in read(tmp_path / "a.parquet")]
    assert [row["messages"][1]["tool_calls"][0]["function"]["arguments"] for row in canonical] == arguments


def test_nulls_of_columns_and_of_lists_are_kept(tmp_path: Path) -> None:
    rows = [{"a": None, "b": {"c": None, "d": 1}, "e": ["x", None]}, {"a": 1, "b": {"c": 2, "d": None}, "e": []}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == rows
