"""Rows that cannot be used are counted by cause with their first places, and dropped by a key."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.run import RunConfig
from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.store.ledger import Ledger
from dist_ft.errors import Problem, RequestError
from dist_ft.inspect.ledger import ledger_tables
from dist_ft.prepare import describe_data, prepare

GOOD = [{"prompt": f"question {n}", "completion": "answer"} for n in range(20)]
LINES = [
    *map(json.dumps, GOOD[:5]),
    '{"prompt": "cut',
    json.dumps({"prompt": "a", "completion": 3}),
    *map(json.dumps, GOOD[5:]),
    json.dumps({"prompt": "a", "completion": None}),
    json.dumps({"prompt": "a", "completion": ["b"]}),
    '{"prompt": "a", "completion": "half \\ud83d"}',
    json.dumps({"prompt": "a", "completion": 7}),
    json.dumps({"question": "a"}),
    json.dumps({"text": "a"}),
]


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Any:
    def config_of(lines: list[str], task: dict[str, Any] | None = None, **data: Any) -> RunConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(lines) + "\n")
        return RunConfig.model_validate(
            {
                "run_name": "t",
                "output_dir": str(tmp_path / "run"),
                "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
                "task": {"name": "instruction", "max_length": 64, **(task or {})},
                "data": {"train": str(path), "cache_dir": str(tmp_path / "cache"), **data},
                "method": {"name": "full"},
                "engine": {"name": "ddp"},
                "optim": {},
                "train": {"global_batch_size": 2, "per_device_train_batch_size": 2},
                "track": {},
                "launch": {"name": "local", "workers_per_node": 1},
            }
        )

    return config_of


def problem(config: RunConfig) -> Problem:
    with pytest.raises(RequestError) as caught:
        prepare(config)
    (found,) = caught.value.problems
    return found


def test_invalid_rows_are_counted_by_cause(make: Any, tmp_path: Path) -> None:
    found = problem(make(LINES))
    path = tmp_path / "rows.jsonl"
    assert found.where == "data.train" and "8 rows (of 28 read) cannot be used" in found.rule
    third, cut = f"{path}:7, {path}:23, {path}:26", 'column 12 of \'{"prompt": "cut\''
    said = [
        f"3 because format prompt_completion: completion is not a string (such as 3), first at {third}",
        f"1 because the line is not valid JSON (Unterminated string starting at) (such as {cut}), first at {path}:6",
        f"1 because a text has half of a surrogate pair (such as '\\ud83d' in 'half '), first at {path}:25",
        f"1 because columns question match no supported format, first at {path}:27",
        "1 because format text is not supported with task=instruction",
    ]
    for text in said:
        assert text in found.rule
    assert "set data.invalid_rows=drop" in found.way_out


def test_invalid_rows_are_dropped_by_a_key(make: Any) -> None:
    ledger = prepare(make(LINES, invalid_rows="drop")).train.ledger
    assert (ledger["rows_read"], ledger["rows_kept"]) == (28, 20)
    assert sum(tally["rows"] for tally in ledger["dropped"].values()) == 8
    assert problem(make(LINES, {"unsupervised": "drop"})).rule.startswith("8 rows (of 28 read)")


def test_rows_without_an_answer_have_a_key_of_their_own(make: Any) -> None:
    lines = [*map(json.dumps, GOOD), json.dumps({"prompt": "a", "completion": " "})]
    assert problem(make(lines, invalid_rows="drop")).way_out.endswith("set task.unsupervised=drop")
    assert problem(make([*lines, "{"])).way_out.endswith("set task.unsupervised=drop and data.invalid_rows=drop")
    kept = prepare(make([*lines, "{"], {"unsupervised": "drop"}, invalid_rows="drop")).train.ledger
    assert kept["rows_kept"] == 20


def test_many_causes_are_summed_up() -> None:
    ledger = Ledger()
    for n in range(20):
        for _ in range(n + 1):
            ledger.refuse(InvalidRow(f"cause {n}", "correct it"), f"f:{n}")
    (found,) = ledger.problems("train", {})
    assert "210 rows" in found.rule and "20 because cause 19" in found.rule and "13 because cause 12" in found.rule
    assert "cause 11" not in found.rule and "78 for 12 other reasons" in found.rule
    assert found.way_out.count("correct it") == 1


def test_files_and_what_is_left_out_are_said(make: Any, tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    for name, rows in {"train-0.jsonl": GOOD[:4], "train-1.jsonl": GOOD[4:9], "validation-0.jsonl": GOOD[9:]}.items():
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "notes.docx").write_text("x")
    config = make([], train=str(folder), validation=str(folder))
    prepared = prepare(config)
    assert prepared.train.ledger["files"] == {str(folder / "train-0.jsonl"): 4, str(folder / "train-1.jsonl"): 5}
    (table,) = ledger_tables(config, prepared.train, "train")
    cells = [[str(cell) for cell in column.cells] for column in table.columns]
    assert [column[1] for column in cells] == ["  of files", "2", "4 rows of train-0.jsonl, 5 rows of train-1.jsonl"]
    assert list(describe_data(config, prepared)) == [
        (
            "data.train: 2 files: 4 rows of train-0.jsonl, 5 rows of train-1.jsonl; left out: "
            "1 file (not a data format): notes.docx; 1 file (split validation): validation-0.jsonl"
        ),
        (
            "data.validation: 1 file: 11 rows of validation-0.jsonl; left out: "
            "1 file (not a data format): notes.docx; 2 files (split train): train-0.jsonl, train-1.jsonl"
        ),
    ]
