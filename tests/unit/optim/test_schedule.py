"""Schedules are those of transformers, but that the first step of a warmup is not wasted."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import get_scheduler

from dist_ft.config.optim import OptimConfig
from dist_ft.optim.schedule import learning_rate

PEAK, STEPS = 0.02, 40
KINDS = {"linear": "linear", "cosine": "cosine", "constant": "constant_with_warmup"}


def rates(kind: Any, warmup_ratio: float) -> list[float]:
    config = OptimConfig(learning_rate=PEAK, lr_scheduler_type=kind, warmup_ratio=warmup_ratio)
    return [learning_rate(config, step, STEPS) for step in range(1, STEPS + 1)]


def rates_of_transformers(kind: str, warmup: int) -> list[float]:
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=PEAK)
    schedule = get_scheduler(KINDS[kind], optimizer, num_warmup_steps=warmup, num_training_steps=STEPS)
    found = []
    for _ in range(STEPS):
        found.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return found


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("warmup", [0, 1, 10])
def test_after_the_warmup_a_schedule_is_that_of_transformers(kind: str, warmup: int) -> None:
    assert rates(kind, warmup / STEPS)[warmup:] == pytest.approx(rates_of_transformers(kind, warmup)[warmup:])


@pytest.mark.parametrize("kind", KINDS)
def test_a_warmup_rises_in_equal_parts_from_its_first_step(kind: str) -> None:
    assert rates(kind, 10 / STEPS)[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])


def test_a_part_of_a_step_of_warmup_is_a_whole_one() -> None:
    assert rates("constant", 0.03)[:3] == pytest.approx([PEAK / 2, PEAK, PEAK])
