"""A rank that is slower than the others, or waits for its data, is named once."""

from __future__ import annotations

import io
import time
from typing import Any

import pytest
import torch

from dist_ft.process.place import Place, Worker
from dist_ft.state import StepInfo
from dist_ft.track import pace
from dist_ft.track.pace import WINDOW, Pace, compare, find_slow


def test_each_rank_is_compared_with_the_median_of_the_others() -> None:
    assert compare([1.0, 2.0]) == [(0.5, 2.0), (2.0, 1.0)]
    assert compare([1.0, 1.0, 4.0, 3.0]) == [(1 / 3, 3.0), (1 / 3, 3.0), (4.0, 1.0), (3.0, 1.0)]
    assert compare([0.7]) == [(1.0, 0.7)]
    assert compare([0.0, 0.0]) == [(1.0, 0.0), (1.0, 0.0)]


@pytest.mark.parametrize(
    ("times", "least_s", "slow"),
    [
        ([1.0, 1.6, 1.0, 1.1], 0.05, [1]),
        ([1.0, 1.4, 1.0, 1.1], 0.05, []),  # not 1.5 times as long
        ([0.001, 0.01], 0.05, []),  # too short to matter
        ([0.4, 1.0, 0.4, 0.9, 0.4], 0.05, [1, 3]),
        ([3.0], 0.05, []),
    ],
)
def test_slow_ranks(times: list[float], least_s: float, slow: list[int]) -> None:
    assert find_slow(times, least_s) == slow


class Others:
    """Takes the place of the exchange: adds what other ranks have measured."""

    def __init__(self, others: list[list[float]]) -> None:
        self.others = others
        self.posted: list[list[float]] | None = None

    def post(self, numbers: list[float]) -> None:
        self.posted = [list(numbers), *self.others]

    def take(self) -> list[list[float]] | None:
        found, self.posted = self.posted, None
        return found


def walk(others: list[list[float]], steps: int, load_s: float = 0.0) -> tuple[Pace, dict[str, float], str]:
    """Take steps of one second each on rank 0; return the last metrics, and what was said."""
    terminal = io.StringIO()
    worker = Worker(Place(0, 1 + len(others), host="a"), torch.device("cpu"), terminal, lambda what: None)
    one = Pace(worker)
    one.hosts, one._exchange = [f"host-{rank}" for rank in range(1 + len(others))], Others(others)  # type: ignore[assignment]
    metrics: Any = {}
    for step in range(1, steps + 1):
        one._clock._passed_s = 0.2
        metrics = one.after_step(StepInfo(step, 1.0, 10, 10, load_time_s=load_s))
    return one, dict(metrics), terminal.getvalue()


def test_a_slow_rank_is_named_once_with_its_part(capsys: pytest.CaptureFixture[str]) -> None:
    _, metrics, said = walk([[0.0, 0.5, 1.0], [0.0, 0.2, 1.0]], 3 * WINDOW + 1)
    assert said.count("\n") == 1, "once"
    assert "rank 1 on host-1 is slow: its forward passes took 0.5 s a step, and 0.2 s on other ranks" in said
    assert f"medians of {WINDOW} steps up to step {WINDOW})" in said
    assert said.removeprefix("dist-ft: ") in capsys.readouterr().out, "also in the logs"
    assert metrics == {"perf/load_time_s": 0.0, "perf/slowest_rank_ratio": 2.5}


def test_nothing_is_known_before_the_first_window() -> None:
    _, metrics, said = walk([[0.0, 9.0, 1.0]], WINDOW)
    assert (metrics, said) == ({}, "")


def test_slow_data_are_named_on_a_single_rank() -> None:
    _, metrics, said = walk([], WINDOW + 1, load_s=0.4)
    assert "rank 0 on host-0 waits for its data: loading took 0.4 s of 1 s a step" in said
    assert metrics == {"perf/load_time_s": 0.4, "perf/slowest_rank_ratio": 1.0}


def test_equal_ranks_are_not_named() -> None:
    _, metrics, said = walk([[0.1, 0.25, 1.0], [0.1, 0.15, 1.0]], 2 * WINDOW, load_s=0.1)
    assert said == "" and metrics["perf/slowest_rank_ratio"] == pytest.approx(0.35 / 0.275)


def test_calls_of_the_loss_are_measured() -> None:
    clock = pace._Clock(torch.device("cpu"))
    clock.start()
    time.sleep(0.02)
    clock.stop()
    assert clock.take() >= 0.02 and clock.take() == 0.0
