"""Trackers that combine others."""

from __future__ import annotations

import math

import pytest

from dist_ft.state import Metrics
from dist_ft.track.compose import Guarded, Trackers


class Kept:
    """Tracker that keeps what it is given, and fails where it is told to."""

    def __init__(self, *fails: str) -> None:
        self.fails = fails
        self.logged: list[tuple[int, Metrics]] = []
        self.closed: list[BaseException | None] = []

    def log(self, metrics: Metrics, *, step: int) -> None:
        if "log" in self.fails:
            raise OSError("the server is gone\nand more")
        self.logged.append((step, metrics))

    def close(self, error: BaseException | None = None) -> None:
        self.closed.append(error)
        if "close" in self.fails:
            raise OSError("it cannot be reached")


def test_every_tracker_is_closed_with_the_error_that_ended_the_run() -> None:
    first, second, error = Kept(), Kept("close"), RuntimeError("nan")
    with pytest.raises(OSError, match="cannot be reached"):
        Trackers([first, second]).close(error)
    assert first.closed == second.closed == [error]


def test_a_tracker_that_fails_is_given_up_with_one_warning() -> None:
    told: list[str] = []
    inner = Kept("log")
    guarded = Guarded("mlflow", inner, told.append)
    guarded.log({"a": 1.0}, step=1)
    guarded.log({"a": 1.0}, step=2)
    guarded.close(None)
    assert told == ["mlflow failed (the server is gone) and is disabled"]
    assert not inner.closed


def test_values_that_are_not_finite_are_left_out() -> None:
    inner = Kept()
    Guarded("x", inner, print).log({"a": math.nan, "b": math.inf, "c": 2.0}, step=3)
    assert inner.logged == [(3, {"c": 2.0})]
