"""metrics.jsonl holds each step exactly once, in complete lines."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from dist_ft.track.jsonl import JsonLines, read_evaluations, read_metrics


def lines(path: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_logged_step_is_one_line_at_once(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.log({"eval/loss": 3.0}, step=0)
    assert lines(path) == [{"step": 0, "eval/loss": 3.0}]
    log.log({"train/loss": 2.5, "train/supervised_tokens": 7}, step=1)
    log.log({"eval/loss": 2.0}, step=1)  # an evaluation is merged into the line of its step
    assert (
        path.read_text().splitlines()[1]
        == '{"step": 1, "train/loss": 2.5, "train/supervised_tokens": 7, "eval/loss": 2.0}'
    )
    log.log({"train/loss": 1.0}, step=2)
    log.close()
    log.close()
    assert [line["step"] for line in lines(path)] == [0, 1, 2]


def test_a_value_logged_again_replaces_the_longer_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.log({"eval/loss": 0.123456789}, step=0)
    log.log({"eval/loss": 0.5}, step=0)
    assert path.read_text() == '{"step": 0, "eval/loss": 0.5}\n'


@pytest.mark.parametrize("after_step", [0, 1, 2, 3, 9])
def test_resume_drops_what_comes_again(tmp_path: Path, after_step: int) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    for step in range(4):
        log.log({"train/loss": float(step)}, step=step)
    log.close()
    log = JsonLines(path, after_step=after_step)
    log.log({"eval/loss": 1.0}, step=after_step)
    log.log({"train/loss": -1.0}, step=after_step + 1)
    log.close()
    kept = [step for step in range(4) if step <= after_step] if after_step else []
    assert [line["step"] for line in lines(path)] == [*sorted({*kept, after_step}), after_step + 1]
    if 0 < after_step < 4:
        assert lines(path)[after_step] == {"step": after_step, "train/loss": float(after_step), "eval/loss": 1.0}
        assert lines(path)[0] == {"step": 0, "train/loss": 0.0}


def test_a_torn_last_line_does_not_spoil_a_resume(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "train/loss": 2.0}\n{"step": 2, "trai')
    log = JsonLines(path, after_step=2)
    log.log({"train/loss": 1.0}, step=3)
    log.close()
    assert [line["step"] for line in lines(path)] == [1, 3]


def test_every_json_reader_can_read_it(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    log = JsonLines(path)
    log.log({"eval/perplexity": math.inf, "eval/loss": math.nan}, step=0)

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not valid JSON")

    assert json.loads(path.read_text(), parse_constant=refuse) == {
        "step": 0,
        "eval/perplexity": None,
        "eval/loss": None,
    }


def test_first_and_last_evaluation(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    assert read_evaluations(path) == ({}, {}) and list(read_metrics(path)) == []
    log = JsonLines(path)
    log.log({"eval/loss": 3.0, "eval/exact_match": 0.1}, step=0)
    log.log({"train/loss": 1.0}, step=1)
    log.log({"train/loss": 1.0}, step=2)
    log.log({"eval/loss": 1.0, "eval/exact_match": 0.7}, step=2)
    first, last = read_evaluations(path)
    assert first == {"step": 0, "eval/loss": 3.0, "eval/exact_match": 0.1}
    assert last == {"step": 2, "eval/loss": 1.0, "eval/exact_match": 0.7}
