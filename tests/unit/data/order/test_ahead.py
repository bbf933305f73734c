"""Micro-batches of the next step are made while the present one is computed."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from dist_ft.data.order.ahead import Ahead


class Made:
    """A loader that records which steps it made, in which thread."""

    def __init__(self) -> None:
        self.steps: list[int] = []
        self.threads: list[int] = []
        self.next = threading.Event()

    def step(self, step: int) -> Any:
        if step < 0:
            raise ValueError("no such step")
        self.steps.append(step)
        self.threads.append(threading.get_ident())
        if len(self.steps) > 1:
            self.next.set()
        return [f"{step}a", f"{step}b"]


def test_the_next_step_is_made_in_a_thread() -> None:
    made = Made()
    ahead = Ahead(made.step, lambda batch: f"{batch}!", last=3)  # type: ignore[arg-type,return-value]
    assert ahead.step(1) == ["1a!", "1b!"]
    assert made.next.wait(10), "the next step begins without being asked for"
    assert ahead.step(2) == ["2a!", "2b!"] and ahead.step(3) == ["3a!", "3b!"]
    ahead.thread.shutdown()
    assert made.steps == [1, 2, 3], "each step once, and none behind the last"
    assert made.threads[0] == threading.get_ident() and made.threads[1] != made.threads[0]


def test_any_other_step_is_made_when_it_is_asked_for() -> None:
    ahead = Ahead(Made().step, lambda batch: batch, last=9)
    assert [ahead.step(step)[0] for step in (4, 2, 3, 8)] == ["4a", "2a", "3a", "8a"]


def test_an_error_is_raised_at_its_step() -> None:
    made = Made()
    ahead = Ahead(lambda step: made.step(-1 if step == 2 else step), lambda batch: batch, last=3)
    assert ahead.step(1)
    with pytest.raises(ValueError, match="no such step"):
        ahead.step(2)
