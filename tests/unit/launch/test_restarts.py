"""Which failures start the workers again, and how often."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.plan import Plan, make_plan
from dist_ft.config.run import RunConfig
from dist_ft.launch import process, restarts
from dist_ft.launch.launcher import Rendered
from dist_ft.process.failure import Kind
from tests.runs import token_run

Start = tuple[int, Any, Any]  # exit code, kind of failure, step that is saved before it


def plan_of(folder: Path, most: int) -> Plan:
    config = token_run(folder / "run", "model", "rows.jsonl", "ddp", 2, 1, False, {"name": "full"})
    config["train"] |= {"restarts": most}
    return make_plan(RunConfig.model_validate(config), nodes=1, workers_per_node=2, origins={})


@pytest.fixture
def starts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[int, int]]:
    """Let starts end as they are given; return the exit code of the run, and how many starts there were."""

    def run_all(most: int, *given: Start, stopped: bool = False) -> tuple[int, int]:
        plan, left = plan_of(tmp_path, most), list(given)

        def run(_: Rendered, run_dir: Path, *, signals: Any = None) -> int:
            code, kind, step = left.pop(0)
            (run_dir / "checkpoints" / f"step-{step or 1}").mkdir(parents=True, exist_ok=step is None)
            (run_dir / "failure.json").unlink(missing_ok=True)
            if kind is not None:
                (run_dir / "failure.json").write_text(json.dumps({"exit_code": code, "kind": kind}))
            if stopped:
                signals.first = signal.SIGTERM
            return code

        monkeypatch.setattr(process, "run", run)
        return restarts.run(plan, Rendered({}, ("true",))), len(given) - len(left)

    return run_all


@pytest.mark.parametrize("kind", [Kind.DIED, Kind.HUNG, Kind.LOST, Kind.EXCEPTION, None])
def test_a_failure_that_may_pass_starts_the_workers_again(starts: Callable, kind: Kind | None, capsys) -> None:
    assert starts(2, (4, kind, 5), (0, None, 9)) == (0, 2)
    assert "restart 1 of 2 (train.restarts), from step 5, the newest checkpoint" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("code", "kind"), [(4, Kind.ERROR), (2, Kind.ERROR), (3, Kind.ERROR), (75, Kind.ERROR), (0, None)]
)
def test_other_ends_are_final(starts: Callable, code: int, kind: Kind | None) -> None:
    assert starts(5, (code, kind, 5)) == (code, 1)


def test_a_run_that_was_stopped_is_not_started_again(starts: Callable) -> None:
    assert starts(5, (4, Kind.LOST, 5), stopped=True) == (4, 1)


def test_there_are_no_more_restarts_than_asked_for(starts: Callable) -> None:
    assert starts(2, *((4, Kind.DIED, step) for step in range(1, 9))) == (4, 3)
    assert starts(0, (4, Kind.DIED, 20), (0, None, None)) == (4, 1)


def test_three_starts_without_a_newer_checkpoint_are_the_last(starts: Callable, capsys) -> None:
    assert starts(99, (4, Kind.DIED, 5), *[(4, Kind.DIED, None)] * 9) == (4, 4)
    assert "no further restart: 3 starts in a row ended without a newer checkpoint" in capsys.readouterr().err
