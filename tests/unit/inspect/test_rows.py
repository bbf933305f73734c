"""Tests that the row viewer marks supervised tokens, with and without colors."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.inspect import rows as view
from dist_ft.state import Facts

CHAT = [{"role": "user", "content": "Is [bold] it on?"}, {"role": "assistant", "content": "It is."}]


@pytest.fixture
def run_file(tmp_path: Path, tiny_llama: Path) -> Path:
    rows = [{"messages": CHAT}, {"messages": CHAT[:1]}, {"messages": CHAT}]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content: dict[str, Any] = {
        "run_name": "t",
        "output_dir": str(tmp_path / "run"),
        "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
        "task": {"name": "instruction", "unsupervised": "drop"},
        "data": {"train": str(tmp_path / "rows.jsonl"), "cache_dir": str(tmp_path / "cache")},
        "method": {"name": "full"},
        "engine": {"name": "ddp"},
        "optim": {},
        "train": {"global_batch_size": 1, "per_device_train_batch_size": 1},
        "track": {},
        "launch": {"name": "local", "workers_per_node": 1},
    }
    return write_plan(make_plan(RunConfig.model_validate(content), nodes=1, workers_per_node=1, origins={}))


def test_supervised_tokens_stand_in_brackets_where_there_is_no_colour(
    run_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert view.main([str(run_file), "rows=2"]) == 0
    shown = capsys.readouterr().out
    expected = "<|im_start|>user\nIs [bold] it on?<|im_end|>\n<|im_start|>assistant\n[[It is.<|im_end|>]]\n"
    assert shown.count(expected) == 1
    assert "rows.jsonl:2: cannot be used: there is no assistant turn" in shown
    assert "rows read" in shown and "dropped" in shown


def test_on_a_terminal_they_are_coloured(run_file: Path) -> None:
    from dist_ft.config.plan import read_plan

    out = io.StringIO()
    console = Console(file=out, force_terminal=True, color_system="standard", width=100, highlight=False)
    view.show_rows(read_plan(run_file).config, "train", 1, console)
    assert "\x1b[1;32mIt is.<|im_end|>\x1b[0m" in out.getvalue() and "[[" not in out.getvalue()


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ("rows=0", "rows: number of rows"),
        ("split=training", "split: split to show"),
        ("colour=no", "known keys: rows, split, width"),
        ("rows", "did you mean rows=…?"),
    ],
)
def test_wrong_options_are_refused(run_file: Path, wrong: str, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert view.main([str(run_file), wrong]) == 2
    assert told in capsys.readouterr().err


def test_a_split_that_is_not_set_is_refused(run_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert view.main([str(run_file), "split=test"]) == 2
    assert "data.test: is not set" in capsys.readouterr().err


def test_tokens_without_a_tokenizer_are_numbers() -> None:
    assert view.render_tokens(None, [1, 2, 3], [False, True, True], marked=True).plain == "1 [[2 3 ]]"


def test_a_first_token_is_marked_where_it_is_a_target() -> None:
    ids = [5, 6, 7]
    assert view.find_targets({"input_ids": ids, "labels": [5, -100, 7]}) == [False, False, True]
    assert view.find_targets({"input_ids": ids, "span": [0, 1], "null": [2]}) == [True, True, False]
    assert view.find_targets({"input_ids": ids, "span": [0, 0], "null": [0]}) == [False] * 3
    assert view.find_targets({"input_ids": ids}, "max_target_length") == [True] * 3
    assert view.find_targets({"input_ids": ids}) == [False] * 3


def test_of_a_sequence_without_labels_the_length_is_told() -> None:
    assert view.describe_sequence({"input_ids": [1, 2, 3]}, Facts()) == "3 tokens"
