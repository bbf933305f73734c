"""Requests to stop that are no signals: the time limit of the job, and the file of a launcher."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.plan import Plan, make_plan
from dist_ft.config.run import RunConfig
from dist_ft.worker import find_request, time_to_stop
from tests.runs import token_run

NOW = 1_800_000_000.0


def plan(**keys: Any) -> Plan:
    config = token_run(Path("runs/a"), "model", "rows.jsonl", "ddp", 2, 1, False, {"name": "full"})
    config["train"] |= keys
    return make_plan(RunConfig.model_validate(config), nodes=1, workers_per_node=2, origins={})


@pytest.mark.parametrize(
    ("end", "keys", "before_s"),
    [
        (NOW + 86_400, {}, 120),
        (NOW + 300, {}, 30),  # a tenth of a short limit
        (NOW + 300, {"stop_before_s": 200}, 200),
        (NOW + 300, {"stop_before_s": 0}, 0),
    ],
)
def test_time_to_stop_before_the_limit(
    end: float, keys: dict[str, Any], before_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(end)))
    assert time_to_stop(plan(**keys), NOW) == end - before_s


@pytest.mark.parametrize("value", [None, "", "N/A", "0"])
def test_without_a_limit_there_is_no_time_to_stop(value: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_END_TIME", raising=False)
    if value is not None:
        monkeypatch.setenv("SLURM_JOB_END_TIME", value)
    assert time_to_stop(plan(), NOW) == math.inf


def test_requests_are_found_once(tmp_path: Path) -> None:
    file = tmp_path / "stop_requested"
    assert find_request(file, math.inf) is None
    file.write_text("SIGHUP")
    assert find_request(file, math.inf) == "SIGHUP"
    assert find_request(file, math.inf) is None
    assert find_request(file, 0.0) == "time limit of the job"
