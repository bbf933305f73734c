"""Tests of repeated rows: rows with equal tokens are counted and reported, within a split and across splits."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from dist_ft.config.run import RunConfig
from dist_ft.data.store.repeats import count_repeats, digest_rows
from dist_ft.data.store.table import TokenTable
from dist_ft.inspect.ledger import ledger_table
from dist_ft.prepare import Prepared, prepare
from dist_ft.state import Layout
from dist_ft.testing.words import save_model


def test_rows_are_equal_by_all_their_sequences() -> None:
    """The pair [1, 2], [3] differs from [1], [2, 3] and from [3], [1, 2]."""
    rows: list[dict[str, list[int]]] = [
        {"input_ids": ids} for ids in ([1, 2], [3], [1], [2, 3], [3], [1, 2], [1, 2], [3])
    ]
    table = TokenTable.of(rows)
    pairs = digest_rows(table, Layout({}, ("input_ids",), sequences=2))
    assert len(pairs) == 4 and pairs[0] == pairs[3] and len(set(pairs.tolist())) == 3
    alone = digest_rows(table, Layout({}, ("input_ids",)))
    same = [[int(a == b) for b in alone] for a in alone]
    assert same == [[int(a == b) for b in rows] for a in rows]
    assert count_repeats(alone) == 8 - 4


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("bert", tmp_path_factory.mktemp("bert"))


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def prepared(folder: Path, model: str, task: dict[str, Any], **splits: Any) -> Prepared:
    return prepare(
        RunConfig.model_validate(
            {
                "run_name": "r",
                "output_dir": str(folder / "run"),
                "model": {"dtype": "float32", "name_or_path": model},
                "task": {"max_length": 16, **task},
                "data": {"cache_dir": str(folder / "cache"), **splits},
                "method": {"name": "full"},
                "engine": {"name": "ddp"},
                "optim": {},
                "train": {"max_steps": 1, "global_batch_size": 1, "per_device_train_batch_size": 1},
                "track": {"wandb": "off"},
                "launch": {"name": "local"},
            }
        )
    )


def labelled(*texts: str) -> list[dict[str, Any]]:
    return [{"text": text, "label": "ab"[number % 2]} for number, text in enumerate(texts)]


def test_what_stands_twice_is_told_whatever_its_label(tmp_path: Path, bert: str) -> None:
    train = write(tmp_path / "train.jsonl", labelled("w1", "w1", "w2 w3", "w4", "w1 w1"))
    found = prepared(
        tmp_path,
        bert,
        {"name": "sequence_classification"},
        train=train,
        validation=write(tmp_path / "validation.jsonl", labelled("w4", "w5", "w2 w3")),
        test=write(tmp_path / "test.jsonl", labelled("w6", "w7")),
    )
    assert found.train.ledger["repeated"] == 1
    console = Console(width=100)
    with console.capture() as shown:
        console.print(ledger_table(found.train, "data.train"))
    assert "repeated" in shown.get() and "same tokens" in shown.get()
    (line,) = found.describe_shared()
    assert line.startswith("data.validation: 2 of 3 rows are also in data.train")
    assert list(found.describe_shared("test")) == []
    whole = prepared(tmp_path, bert, {"name": "sequence_classification"}, train=train, validation=train)
    assert next(whole.describe_shared()).startswith("data.validation: all 5 rows")


def test_pieces_of_one_row_are_one(tmp_path: Path, bert: str) -> None:
    """Rows are counted, not the pieces of long contexts; another question on the same context is another row."""
    context = " ".join(f"w{number}" for number in range(10, 50))
    answers = {"text": ["w12"], "answer_start": [context.find("w12")]}
    rows = [{"question": question, "context": context, "answers": answers} for question in ("w1", "w2", "w1")]
    path = write(tmp_path / "train.jsonl", rows)
    task = {"name": "question_answering", "doc_stride": 2}
    found = prepared(tmp_path, bert, task, train=path)
    assert found.train.ledger["samples"] > 6 and len(found.train.digests()) == 3
    assert found.train.ledger["repeated"] == 1


def test_over_the_sets_of_a_mixture(tmp_path: Path, bert: str) -> None:
    one = write(tmp_path / "one.jsonl", [{"text": "w1 w2"}, {"text": "w3 w4"}])
    two = write(tmp_path / "two.jsonl", [{"text": "w5 w6"}, {"text": "w5 w6"}])
    held = write(tmp_path / "held.jsonl", [{"text": "w5 w6"}, {"text": "w7 w8"}])
    mixture = {"one": {"train": one}, "two": {"train": two, "validation": held}}
    found = prepared(tmp_path, bert, {"name": "masked_lm", "packing": False}, mixture=mixture)
    assert found.train.ledger["repeated"] == 1 and found.train.digests().dtype == np.uint64
    assert next(found.describe_shared()).startswith("data.validation: 1 of 2 rows")
