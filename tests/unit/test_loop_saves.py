"""When checkpoints are saved, what a stop saves, and that neither needs a further collective."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch

from dist_ft import loop
from dist_ft.config.train import TrainConfig
from dist_ft.errors import Stopped, TrainingError
from dist_ft.loop import Records, Run, Training, fit
from dist_ft.process import comm
from dist_ft.process.stop import AGAIN, WITH_AUTO
from dist_ft.state import Batch, LossSum, Progress, StepStats

STEPS, STEPS_IN_EPOCH = 10, 4
NONE = torch.zeros(2, dtype=torch.int64)
BATCH = Batch({"document_lengths": [4]}, targets=NONE, positions=NONE, documents=NONE, tokens=4)


class Engine:
    """An engine without a model."""

    def forward_backward(self, micro: Batch, loss: Any, denominator: Any, *, last: bool) -> LossSum:
        return LossSum(torch.tensor(3.0), torch.tensor(2.0))

    def step(self, learning_rate: float) -> StepStats:
        return StepStats(1.0)


class Task:
    loss = None


class Tracker:
    def log(self, metrics: Any, *, step: int) -> None: ...
    def close(self, error: BaseException | None = None) -> None: ...


class Clock:
    """Minutes pass as the steps do."""

    def __init__(self, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(loop.time, "monotonic", lambda: 60.0 * run.progress.step)
        run.saved_at = 0.0


def make(saved: list[int], rank: int = 0, **keys: Any) -> Run:
    training = Training(
        task=Task(),  # type: ignore[arg-type]
        engine=Engine(),  # type: ignore[arg-type]
        batches=lambda step: [BATCH],
        learning_rate=lambda step: 0.1,
        epoch_at=lambda step: step / STEPS_IN_EPOCH,
        total_steps=STEPS,
        hooks=[],
    )
    records = Records(Tracker(), lambda progress: saved.append(progress.step), lambda name: None, lambda: None)
    progress = Progress(0, 1, "ddp", None, None, None, 0)
    return Run(TrainConfig(**keys), rank, training, None, records, lambda phase: None, progress)


@pytest.mark.parametrize(
    ("keys", "saves"),
    [
        ({}, [4, 8, 10]),
        ({"save_minutes": 3}, [4, 8, 10]),  # noticed before the step that follows
        ({"save_minutes": None}, [10]),
        ({"save_steps": 3}, [3, 6, 9, 10]),
        ({"save_steps": 5, "save_minutes": 3}, [4, 5, 9, 10]),
    ],
)
def test_when_checkpoints_are_saved(keys: dict[str, Any], saves: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    run = make(saved, **keys)
    Clock(run, monkeypatch)
    fit(run)
    assert saved == saves


def test_epochs_of_seconds_do_not_save_each(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    run = make(saved)
    monkeypatch.setattr(loop.time, "monotonic", lambda: 12.0 * run.progress.step)  # an epoch takes 48 s
    run.saved_at = 0.0
    fit(run)
    assert saved == [8, 10]


def test_the_last_save_is_waited_for_and_knows_that_training_has_ended() -> None:
    done: list[Any] = []
    run = make([])
    tracker, restore, export = run.records.tracker, run.records.restore, run.records.export
    save = lambda progress: done.append((progress.step, progress.complete))  # noqa: E731
    run.records = Records(tracker, save, restore, export, settle=lambda: done.append("settled"))
    fit(run)
    assert done == [(STEPS, True), "settled"]


def test_an_error_of_a_save_in_the_background_ends_the_next_step() -> None:
    saved: list[int] = []
    run = make(saved, save_steps=3)
    error = TrainingError.of("disk", "refused", "mend it")

    def settle() -> None:
        raise error

    records = run.records
    run.records = Records(
        records.tracker, records.save, records.restore, records.export, settle, lambda: error if saved else None
    )
    with pytest.raises(TrainingError, match="refused"):
        fit(run)
    assert saved == [3] and run.progress.step == 3


@pytest.mark.parametrize(("in_a_row", "ends"), [(loop.MOST_SKIPPED, False), (loop.MOST_SKIPPED + 1, True)])
def test_only_so_many_steps_in_a_row_are_skipped(in_a_row: int, ends: bool) -> None:
    saved: list[int] = []
    run = make(saved, on_nonfinite="skip", save_steps=100)
    run.training = replace(run.training, total_steps=30)
    run.training.engine.step = lambda rate: StepStats(  # type: ignore[method-assign]
        math.nan if 3 <= run.progress.step < 3 + in_a_row else 1.0
    )
    if not ends:
        assert fit(run).step == 30
        return
    with pytest.raises(TrainingError, match=f"gradient norm nan, after {loop.MOST_SKIPPED} steps in a row"):
        fit(run)
    assert saved == [] and run.progress.step == 3 + loop.MOST_SKIPPED


def test_a_loss_that_is_not_finite_with_a_finite_norm_is_never_skipped() -> None:
    run = make([], on_nonfinite="skip")
    with pytest.raises(TrainingError, match="loss is inf, gradient norm 2"):
        loop.judge(run, 4, math.inf, 2.0)


@pytest.mark.parametrize("name", ["loss", "f1"])
def test_a_score_that_is_not_finite_is_never_the_best(name: str) -> None:
    assert not loop.is_better(math.nan, None, name) and not loop.is_better(math.inf, None, name)
    assert loop.is_better(2.0, None, name) and not loop.is_better(math.nan, 2.0, name)


def test_only_rank_0_looks_at_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    run = make(saved, rank=1, save_minutes=1)
    Clock(run, monkeypatch)
    fit(run)
    assert saved == [STEPS]


@pytest.mark.parametrize(
    ("keys", "limit"),
    [
        ({}, 2),
        ({"save_steps": 3}, None),
        ({"save_steps": 3, "save_total_limit": 5}, 5),
        ({"save_total_limit": None}, None),
        ({"save_minutes": 3}, 2),
    ],
)
def test_how_many_are_kept(keys: dict[str, Any], limit: int | None) -> None:
    assert TrainConfig(**keys).checkpoints_kept == limit


@pytest.mark.parametrize(("resume", "again"), [("auto", AGAIN), ("runs/a/checkpoints/step-1", WITH_AUTO)])
def test_a_stop_saves_the_last_finished_step_once(resume: str, again: str, monkeypatch: pytest.MonkeyPatch) -> None:
    saved: list[int] = []
    run = make(saved, resume=resume, save_minutes=None)
    monkeypatch.setattr(
        run.training.engine, "step", lambda rate: run.progress.step == 5 and run.stop.ask("SIGTERM") or StepStats(1.0)
    )
    with pytest.raises(Stopped) as stopped:
        fit(run)
    assert saved == [6] and run.progress.step == 6
    (problem,) = stopped.value.problems
    assert (problem.where, problem.rule, problem.way_out) == ("SIGTERM", "step 6 of 10 is saved in a checkpoint", again)


def test_a_stop_after_a_save_does_not_save_again() -> None:
    saved: list[int] = []
    run = make(saved, save_steps=3)
    records = run.records

    def save(progress: Progress) -> None:
        records.save(progress)
        run.stop.ask("SIGTERM")

    run.records = Records(records.tracker, save, records.restore, records.export)
    with pytest.raises(Stopped, match="step 3 of 10 is saved"):
        fit(run)
    assert saved == [3]


def test_a_step_has_two_reductions(monkeypatch: pytest.MonkeyPatch) -> None:
    """One for the counts, with the requests to stop and to save and failed saves, and one for the losses."""
    calls: list[int] = []
    total = comm.total
    monkeypatch.setattr(comm, "total", lambda value: calls.append(value.numel()) or total(value))
    fit(make([]))
    assert calls == [7, 2] * STEPS
