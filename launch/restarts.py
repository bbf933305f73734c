"""Start the workers of a run again after a failure that may not happen again, see `train.restarts`."""

from __future__ import annotations

import sys
from typing import Any

from ..config.plan import CHECKPOINTS, FAILURE_FILE, Plan, saved_steps
from ..errors import TrainingError
from ..process.failure import Kind
from ..report.folder import read_object
from . import process
from .launcher import Rendered

MOST_IDLE = 3  # restarts without a newer checkpoint


def run(plan: Plan, rendered: Rendered, **options: Any) -> int:
    """Run a rendered command as `process.run` does, and again after a failure, up to `train.restarts` times.

    Workers go on from the newest checkpoint. Not repeated are runs that the user stopped, errors that the package
    itself raised, which would be raised again, and a failure after three restarts without a newer checkpoint.

    Args:
        plan: Plan of the run.
        rendered: Command to run; its files must already be written.
        options: Further arguments of `process.run`.

    Returns:
        The exit code of the last start.
    """
    most = plan.config.train.restarts
    if not most:
        return process.run(rendered, plan.run_dir, **options)
    number = idle = 0
    step = newest_step(plan)
    while True:
        signals = process.Signals()
        code = process.run(rendered, plan.run_dir, signals=signals, **options)
        if signals.first is not None or not may_pass(code, read_object(plan.run_dir / FAILURE_FILE)):
            return code
        before, step = step, newest_step(plan)
        idle = idle + 1 if step == before else 0
        number += 1
        if number > most:
            return code
        if idle >= MOST_IDLE:
            _say(f"no further restart: {MOST_IDLE} starts in a row ended without a newer checkpoint")
            return code
        where = f"step {step}, the newest checkpoint" if step else "the start, because there is no checkpoint yet"
        _say(f"restart {number} of {most} (train.restarts), from {where}")


def may_pass(code: int, failure: dict[str, Any]) -> bool:
    """Return whether a run with this exit code and failure.json may succeed if it is started again.

    Without a report, a worker was killed together with its monitor.
    """
    return code == TrainingError.exit_code and failure.get("kind", Kind.LOST) != Kind.ERROR


def newest_step(plan: Plan) -> int:
    """Return the step of the newest checkpoint of a run; 0 if there is none."""
    return next((int(path.name.removeprefix("step-")) for path in saved_steps(plan.run_dir / CHECKPOINTS)), 0)


def _say(line: str) -> None:
    print(f"dist-ft: {line}", file=sys.stderr, flush=True)
