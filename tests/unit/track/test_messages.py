"""The first lines of a run tell when checkpoints are saved and how many are kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.plan import read_plan
from dist_ft.config.train import TrainConfig
from dist_ft.state import Progress
from dist_ft.track.messages import describe_saves, summarize
from tests.reports import write_run


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


def test_a_finished_run_tells_time_best_step_and_what_to_do_next(tmp_path: Path) -> None:
    run = write_run(tmp_path / "my runs" / "first", track={"wandb": "off", "report": True})
    progress = Progress(60, 2, "ddp", None, 1.25, 40, 1)
    told = list(summarize(read_plan(run), progress, 3725.4))
    assert told == [
        "trained 60 steps, 1:02:05 since this start: eval/loss 2.0000 → 1.4000, eval/exact_match 0.0000 → 0.6000",
        "best evaluation at step 40: eval/loss 1.2500",
        f"model saved in {run}/model; the reloaded model has the same logits",
        f"report: {run}/report.html",
        f"next: dist-ft generate 'run={run}', or dist-ft export 'run={run}' merge=true out=FOLDER",
    ]
