"""Jobs that SLURM interrupts go on where they stopped, with the same log and tracker; others end."""

from __future__ import annotations

import os
import random
import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cluster.jobs import Submitted, environment, identity_of, run_cli

REAL = "import sys; from dist_ft.launch.cli import main; sys.exit(main(sys.argv[1:]))"


def submit(slurm: dict[str, str], tmp_path: Path, tiny_words: list[str], *more: str) -> Submitted:
    given = [word for word in tiny_words if not word.startswith(("train.max_steps", "track="))]
    words = ["submit", "launch=slurm", "launch.nodes=2", "launch.workers_per_node=1", "launch.partition=spot"]
    words += ["engine=fsdp", f"output_dir={tmp_path}/run", "track.wandb=offline", *given, *more]
    words += ["train.num_train_epochs=null", "train.max_steps=100000", "train.logging_steps=1"]
    return Submitted(identity_of(run_cli(REAL, words, environment(slurm))), tmp_path / "run", slurm)


def assert_goes_on_after(job: Submitted, cause: str, steps_before: int) -> int:
    """Wait until the job was stopped by `cause`, and has trained after that; return the step where it stopped."""
    said = re.compile(rf"{cause}: step (\d+) of 100000 is saved in a checkpoint")
    job.until(lambda: said.search(job.log), 100)
    found = said.findall(job.log)
    stopped = int(found[-1])
    assert stopped > steps_before
    job.until(lambda: f"resuming from the checkpoint of step {stopped}" in job.log, 90)
    job.until(lambda: job.last_step > stopped + 2, 60)
    return stopped


def test_a_job_goes_on_after_a_preemption_and_a_signal_but_not_after_scancel(slurm, tmp_path, tiny_words):
    job = submit(slurm, tmp_path, tiny_words, "train.save_minutes=60", "launch.time=00:20:00")
    job.until(lambda: job.last_step > 2, 240)
    job.preempt()
    stopped = assert_goes_on_after(job, "SIGTERM", 2)
    job.call("scancel", "--batch", "--signal=USR1", job.identity)  # as `--signal=B:USR1@…` sends it
    stopped = assert_goes_on_after(job, "SIGUSR1", stopped)
    job.call("scancel", job.identity)
    assert job.finish(30)[0] == "CANCELLED"
    time.sleep(7)  # a requeued job would have started again
    assert job.state()[0] == "CANCELLED"
    assert [line for line in job.log.splitlines() if line.startswith("dist-ft: restart ")] == [
        f"dist-ft: restart {n} of job {job.identity} on n[1-2], from step {step}"
        for n, step in enumerate(re.findall(r"step (\d+) of 100000 is saved", job.log)[:2], start=1)
    ]
    assert job.steps == list(range(1, job.last_step + 1))
    runs = {folder.name.rpartition("-")[2] for folder in (tmp_path / "run" / "wandb").glob("offline-run-*")}
    assert len(runs) == 1, runs


def interrupt(job: Submitted, kind: str, node: str, again: Callable[[], Submitted]) -> tuple[Submitted, int]:
    """Interrupt a job that trains; return the job that goes on, and how many steps it trains again."""
    begin = max(job.steps, default=0)
    job.until(lambda: job.last_step > begin + 2, 200)
    before, restarts = job.last_step, len(job.starts)
    if kind == "preempted":
        job.preempt()
    elif kind == "requeued":
        job.call("scontrol", "requeue", job.identity)  # the tasks receive SIGTERM
    elif kind == "out of time":
        job.shorten()
    elif kind == "node lost":
        job.power_off(node)
        job.until(lambda: job.state()[0] == "PENDING", 120)
        job.power_on()
    else:
        job.call("scancel", job.identity)
        assert job.finish(60)[0] == "CANCELLED"
        job, restarts = again(), 0
    job.until(lambda: len(job.starts) > restarts, 200)
    resumed = job.until(lambda: re.findall(r"resuming from the checkpoint of step (\d+)", job.starts[-1]), 200)
    return job, max(0, before - int(resumed[0]))


@pytest.mark.faults
@pytest.mark.timeout(3600)
@pytest.mark.skipif(os.environ.get("DIST_FT_FAULTS") != "all", reason="takes about 20 minutes: `make faults`")
def test_twenty_interruptions_lose_nothing(slurm, tmp_path, tiny_words):
    """Only a power cut loses steps, and at most those since the last checkpoint."""
    kinds = ["preempted", "requeued", "out of time", "node lost", "cancelled"] * 4
    random.Random(13).shuffle(kinds)

    def start() -> Submitted:
        return submit(slurm, tmp_path, tiny_words, "train.save_steps=20", "launch.time=01:00:00")

    job, lost = start(), []
    for number, kind in enumerate(kinds):
        job, steps = interrupt(job, kind, f"n{number % 2 + 1}", start)
        lost.append((kind, steps))
        print(*lost[-1], flush=True)
    job.call("scancel", job.identity)
    job.finish(60)
    assert all(steps <= (20 if kind == "node lost" else 0) for kind, steps in lost), lost
    assert job.steps == list(range(1, job.last_step + 1))


def test_a_cancelled_job_saves_and_does_not_start_again(slurm, tmp_path, tiny_words):
    job = submit(slurm, tmp_path, tiny_words, "train.save_minutes=60", "launch.tasks_per_node=1")
    job.until(lambda: job.last_step > 2, 240)
    assert f"running (job {job.identity}, running, on n[1-2])" in job.cli("status", f"run={job.run_dir}")
    assert "saves a checkpoint and stops" in job.cli("cancel", f"run={job.run_dir}")
    assert job.finish(60) == ("FAILED", 75)
    last = job.last_step
    assert f"dist-ft cancel: step {last} of 100000 is saved in a checkpoint" in job.log
    assert "requeueing" not in job.log
    assert f"state   stopped, exit code 75 (job {job.identity}, failed" in job.cli("status", f"run={job.run_dir}")
    assert job.cli("logs", f"run={job.run_dir}", "lines=1000") == job.log
