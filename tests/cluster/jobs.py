"""Jobs of a SLURM cluster on this machine: submit, watch, preempt, and cut the power of a node."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TypeVar

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT.parent / "shared" / "cluster"
Met = TypeVar("Met")
UNDER_WAY = ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING", "REQUEUED", "PREEMPTED")


def environment(slurm: dict[str, str]) -> dict[str, str]:
    path = f"{slurm['PATH']}:{Path(sys.executable).parent}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STUB_WORD": "heard"}


def run_cli(code: str, words: Sequence[str], env: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run the command line of a Python text that calls `cli.main`."""
    command = [sys.executable, "-c", code, *words]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=200)


def identity_of(run: subprocess.CompletedProcess[str]) -> str:
    """Return the id of the job that `dist-ft submit` printed."""
    assert run.returncode == 0, run.stderr
    found = re.search(r"^job (\d+):", run.stdout, re.MULTILINE)
    assert found, run.stdout
    return found[1]


class Submitted:
    """A job that trains in a folder."""

    def __init__(self, identity: str, run_dir: Path, slurm: dict[str, str]) -> None:
        self.identity, self.run_dir, self.slurm = identity, run_dir, slurm
        self.env = environment(slurm)

    @property
    def log(self) -> str:
        file = self.run_dir / "logs" / f"job-{self.identity}.log"
        return file.read_text() if file.exists() else ""

    @property
    def steps(self) -> list[int]:
        """The steps in metrics.jsonl, in order of their lines."""
        file = self.run_dir / "metrics.jsonl"
        lines = file.read_text().splitlines() if file.exists() else []
        return [json.loads(line)["step"] for line in lines if line.endswith("}")]

    @property
    def last_step(self) -> int:
        return (self.steps or [0])[-1]

    def call(self, *command: str) -> str:
        run = subprocess.run(command, cwd=ROOT, env=self.env, capture_output=True, text=True, check=True, timeout=90)
        return run.stdout

    def cli(self, *words: str) -> str:
        """Run a command of `dist-ft` and return its output."""
        return self.call(sys.executable, "-m", "dist_ft.launch.cli", *words)

    def state(self) -> tuple[str, int]:
        """Return the state of the job and its exit code."""
        shown = self.call("scontrol", "show", "job", self.identity)
        state, code = re.search(r"JobState=(\w+)", shown), re.search(r"ExitCode=(\d+):", shown)
        assert state and code, shown
        return state[1], int(code[1])

    def until(self, met: Callable[[], Met], limit_s: float) -> Met:
        """Wait until a condition is met and return it; fail with the log of the job after `limit_s`."""
        end = time.monotonic() + limit_s
        while not (found := met()):
            assert time.monotonic() < end, f"{self.state()}\n{self.log}"
            time.sleep(0.2)
        return found

    def finish(self, limit_s: float) -> tuple[str, int]:
        """Wait until the job has ended; return its state and exit code."""
        self.until(lambda: self.state()[0] not in UNDER_WAY, limit_s)
        return self.state()

    @property
    def starts(self) -> list[str]:
        """The log, in one part for each start of the job."""
        return self.log.split("dist-ft: restart ")

    def shorten(self) -> None:
        """Lower the time limit, so that the signal before it is due at once; give the next start its time again."""
        shown = self.call("squeue", "--noheader", f"--job={self.identity}", "--format=%M")  # [[D-]H:]M:S
        minutes = int(shown.strip().split(":")[-2])
        self.call("scontrol", "update", f"JobId={self.identity}", f"TimeLimit={minutes + 2}")
        self.until(lambda: self.state()[0] == "PENDING", 200)
        self.call("scontrol", "update", f"JobId={self.identity}", "TimeLimit=60")

    def preempt(self) -> None:
        """Start a job of a partition with precedence, which needs both nodes and their GPUs."""
        self.call("srun", "--partition=main", "--nodes=2", "--gres=gpu:2", "--exclusive", "true")

    def power_off(self, node: str) -> None:
        subprocess.run([SCRIPTS / "power-off", self.slurm["CLUSTER_DIR"], node], check=True, timeout=60)

    def power_on(self) -> None:
        subprocess.run(
            [SCRIPTS / "slurm-up", "-n", "2", "-c", "4", "-g", "2", self.slurm["CLUSTER_DIR"]],
            check=True, timeout=60, stdout=subprocess.DEVNULL,
        )  # fmt: skip
