"""The first lines of a run tell when checkpoints are saved and how many are kept."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.config.train import TrainConfig
from dist_ft.track.messages import describe_saves


@pytest.mark.parametrize(
    ("keys", "evaluates", "words"),
    [
        (
            {},
            False,
            "every 15 minutes, after each epoch (at most once a minute), after the last step, and keeps the newest 2 (",
        ),
        (
            {"eval_steps": 5},
            True,
            "minute), at each best evaluation, after the last step, and keeps the newest 2 and",
        ),
        ({"save_steps": 7}, False, "checkpoint every 7 steps, after the last step, and keeps all ("),
        (
            {"save_steps": 7, "save_total_limit": 3},
            True,
            "7 steps, after the last step, and keeps the newest 3 and",
        ),
        ({"save_minutes": None}, False, "after the last step only"),
    ],
)
def test_what_is_told_of_checkpoints(keys: dict[str, Any], evaluates: bool, words: str) -> None:
    told = describe_saves(TrainConfig(**keys), evaluates=evaluates)
    assert words in told and "train.save_steps" in told
