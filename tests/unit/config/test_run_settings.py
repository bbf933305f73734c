"""The settings of a run are the same for every start that may go on with it, and differ for all others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.run import RunConfig, settings_of
from tests.runs import token_run

SAME: list[dict[str, Any]] = [
    {"train": {"max_steps": 7, "save_steps": 2, "resume": "never", "stop_before_s": 9}},
    {"train": {"per_device_train_batch_size": 1, "timeout_s": 5, "accept_changes": ["data"]}},
    {"engine": {"name": "zero3"}},
    {"launch": {"workers_per_node": 1}},
    {"model": {"gradient_checkpointing": True}},
    {"data": {"validation": "rows.jsonl"}},
    {"optim": {"warmup_ratio": 0.0}},  # the default
]
OTHER: list[dict[str, Any]] = [
    {"train": {"seed": 5}},
    {"train": {"global_batch_size": 4}},
    {"optim": {"learning_rate": 0.5}},
    {"task": {"max_length": 12}},
    {"data": {"train": "other.jsonl"}},
    {"method": {"name": "lora"}},
]


def settings(change: dict[str, dict[str, Any]]) -> str:
    config = token_run(Path("runs/a"), "model", "rows.jsonl", "ddp", 2, 1, False, {"name": "full"})
    for group, values in change.items():
        config[group] = {**config.get(group, {}), **values}
    return settings_of(RunConfig.model_validate(config))


@pytest.mark.parametrize("change", SAME, ids=str)
def test_what_may_change(change: dict[str, Any]) -> None:
    assert settings(change) == settings({})


def test_what_may_not_change() -> None:
    found = [settings(change) for change in ({}, *OTHER)]
    assert len(set(found)) == len(found)


def test_no_secret_is_in_it() -> None:
    one, other = ({"privacy": {"noise_multiplier": 1.0, "noise_seed": seed}} for seed in (1, 2))
    assert settings(one) == settings(other) != settings({})
