"""Trackio: what its own reader finds, in a process of its own because it reads its folder when it is imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

CODE = """
from dist_ft.track.trackio import Trackio
first = Trackio("project", "name", {"optim": {"learning_rate": 0.5}})
first.log({"train/loss": 3.0}, step=1)
first.close()
second = Trackio("project", "name", {}, resumes=True)
second.log({"train/loss": 2.0}, step=2)
second.close(RuntimeError("nan"))
from trackio.sqlite_storage import SQLiteStorage
print("runs", SQLiteStorage.get_runs("project"))
print("values", [(row["step"], row["train/loss"]) for row in SQLiteStorage.get_logs("project", "name")])
"""


def test_a_resumed_run_goes_on(tmp_path: Path) -> None:
    environment = {**os.environ, "TRACKIO_DIR": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    run = subprocess.run(
        [sys.executable, "-c", CODE], capture_output=True, text=True, env=environment, check=False, timeout=120
    )
    told = run.stdout.splitlines()
    assert "runs ['name']" in told, run.stdout + run.stderr
    assert "values [(1, 3.0), (2, 2.0)]" in told, run.stdout + run.stderr
