"""Tests of plans for simulated devices: adapted batch sizes, and advice that can be followed."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest

from dist_ft.checks.batch import samples_problems
from dist_ft.config.plan import Plan, write_plan
from dist_ft.errors import RequestError
from dist_ft.launch.planning import plan_data, plan_run
from dist_ft.launch.show import auto_lines, origin_lines
from tests.unit.launch.plans import ROWS, SITE

SIZE, MICRO = "train.global_batch_size", "train.per_device_train_batch_size"


def plan_on(gpus: int, words: list[str]) -> Plan:
    return plan_run(words, None, replace(SITE, devices=tuple(range(gpus))))[0]


def sizes(plan: Plan) -> tuple[int, int, int]:
    """Return the global batch, the micro-batch and the number of micro-batches of a worker."""
    train = plan.config.train
    return train.global_batch_size, train.per_device_train_batch_size, plan.accumulation_steps


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 200)
    return tmp_path


@pytest.mark.parametrize(
    ("gpus", "words", "wanted"),
    [
        (1, [], (32, 4, 8)),
        (8, [], (32, 4, 1)),
        (16, [], (32, 2, 1)),
        (3, [], (36, 4, 3)),  # 33 = 3 × 11 would need micro-batches of one row
        (6, [], (36, 3, 2)),
        (64, [], (64, 1, 1)),
        (8, [f"{SIZE}=16"], (16, 2, 1)),
        (3, [f"{SIZE}=33"], (33, 1, 11)),  # a size that the user set is kept
        (3, [f"{MICRO}=5"], (30, 5, 2)),
        (8, ["experiment=quickstart"], (16, 2, 1)),
    ],
)
def test_sizes_that_are_not_set_adapt(gpus: int, words: list[str], wanted: tuple[int, int, int]) -> None:
    assert sizes(plan_on(gpus, words)) == wanted


def test_the_plan_gives_the_reason() -> None:
    plan = plan_on(6, [])
    lines = list(auto_lines(plan))
    assert f"{SIZE} → 36 (32 cannot be divided into equal micro-batches of 6 workers)" in lines
    assert f"{MICRO} → 3 (4 does not divide the 6 rows of a worker)" in lines
    assert not any(line.startswith("train.") for line in origin_lines(plan))
    assert not any(line.startswith("train.") and "batch" in line for line in auto_lines(plan_on(4, [])))


def test_an_own_file_counts_as_set(folder: Path) -> None:
    (folder / "experiment").mkdir()
    (folder / "experiment" / "mine.yaml").write_text("train:\n  global_batch_size: 32\n")
    with pytest.raises(RequestError, match="cannot be divided"):
        plan_run(["experiment=mine"], folder, replace(SITE, devices=(0, 1, 2)))


def test_a_resumed_run_keeps_its_global_batch() -> None:
    words = ["run_name=first"]
    before = plan_on(3, words)
    assert sizes(before)[0] == 36
    write_plan(before)
    (before.run_dir / "checkpoints" / "step-5").mkdir(parents=True)
    assert sizes(plan_on(2, words)) == (36, 3, 6)
    assert sizes(plan_on(1, words))[0] == 36
    with pytest.raises(RequestError) as caught:
        plan_on(8, words)
    assert [p.way_out for p in caught.value.problems] == [
        "set launch.workers_per_node=6, or set run_name to a new name for a separate run"
    ]
    assert sizes(plan_on(8, [*words, "launch.workers_per_node=6"])) == (36, 3, 2)


@pytest.mark.parametrize("gpus", [1, 2, 3, 8])
@pytest.mark.parametrize("rows", [1, 2, 3, 7, 31, 40])
@pytest.mark.parametrize(
    "given", [{}, {SIZE: 31}, {SIZE: 64}, {MICRO: 3}, {MICRO: 8}, {SIZE: 30, MICRO: 4}, {SIZE: 48, MICRO: 5}]
)
def test_advice_is_followed_at_most_once(folder: Path, gpus: int, rows: int, given: dict[str, int]) -> None:
    (folder / "rows.jsonl").write_text(ROWS * rows)
    values = {"data": "rows.jsonl", **{key: str(value) for key, value in given.items()}}

    def problems() -> list[str]:
        try:
            plan = plan_on(gpus, [f"{key}={value}" for key, value in values.items()])
        except RequestError as error:
            return [problem.way_out for problem in error.problems]
        return [problem.way_out for problem in samples_problems(plan, rows, "rows")]

    if found := problems():
        (advice,) = found
        told = re.findall(r"([a-z_.]+)=(\S+?)(?=,|\s|$)", advice.partition(" or ")[0])
        assert told, advice
        values |= dict(told)
        assert problems() == []


def test_data_is_shown_whatever_the_batch(folder: Path) -> None:
    (folder / "rows.jsonl").write_text(ROWS * 3)
    plan = plan_data(["data=rows.jsonl", f"{SIZE}=31", f"{MICRO}=7", "launch=slurm", "launch.workers_per_node=8"], None)
    assert plan.world_size == 1
    assert plan.config.data.train == str(folder / "rows.jsonl")


def test_a_plan_says_where_metrics_will_go_and_what_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_ft.track.needs.find_spec", lambda name: None)
    monkeypatch.setenv("WANDB_MODE", "offline")
    lines = list(auto_lines(plan_run(["track.to=[wandb,trackio]"], None, SITE)[0]))
    assert "track.wandb → offline (WANDB_MODE=offline)" in lines
    (told,) = [line for line in lines if line.startswith("track.to")]
    assert "trackio requires the package trackio" in told
    assert "pip install 'dist-ft[trackio]'" in told
    assert not [line for line in auto_lines(plan_run(["track=off"], None, SITE)[0]) if line.startswith("track")]
