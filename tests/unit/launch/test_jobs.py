"""How runs stand by their folders, and how they are stopped: each with a real process or a stub of SLURM's programs."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.launch import cli
from dist_ft.launch.jobs import Status, find_status, keep_exit, table_lines
from dist_ft.launch.slurm.queue import SlurmJob, find_job
from tests.golden import check_golden
from tests.runs import token_run

ROOT = Path(__file__).resolve().parents[3]
NOW = 1_800_000_000.0
TRAINS = """
import sys, time
from pathlib import Path
from dist_ft.launch.jobs import keep_exit
from dist_ft.launch.launcher import Rendered
from dist_ft.launch import process
from dist_ft.process.owner import command_owns
folder = Path(sys.argv[1])
with command_owns(folder):
    rendered = Rendered({}, (sys.executable, "-c", sys.argv[2], sys.argv[1]))
    code = keep_exit(folder, lambda: process.run(rendered, folder))
sys.exit(code)
"""
STOPS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))
open(sys.argv[1] + "/up", "w").close()
time.sleep(60)
"""
STUBBORN = STOPS.replace("lambda *_: sys.exit(75)", "signal.SIG_IGN")


def write_run(folder: Path, launch: str = "local", *steps: int) -> Path:
    config = token_run(folder, "model", "rows.jsonl", "ddp", 2, 1, False, {"name": "full"})
    config["launch"] = {"name": launch, "workers_per_node": 1}
    write_plan(make_plan(RunConfig.model_validate(config), nodes=1, workers_per_node=1, origins={}))
    (folder / "logs").mkdir(exist_ok=True)
    lines = [{"step": n, "epoch": n / 10, "train/loss": 2 - n / 8, "eval/loss": 2.5} for n in steps]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def trains(tmp_path: Path) -> Iterator:
    """Start a command that owns a folder and runs a process as `dist-ft train` does."""
    started = []

    def start(code: str) -> tuple[Path, subprocess.Popen[bytes]]:
        folder = write_run(tmp_path / "runs" / "first")
        command = subprocess.Popen([sys.executable, "-c", TRAINS, str(folder), code], cwd=ROOT)
        started.append(command)
        end = time.monotonic() + 20
        while not (folder / "up").exists():
            assert time.monotonic() < end
            time.sleep(0.05)
        return folder, command

    yield start
    for command in started:
        command.kill()
        command.wait()


def test_a_command_that_trains_is_found_and_stopped(trains, capsys: pytest.CaptureFixture[str]) -> None:
    folder, command = trains(STOPS)
    status = find_status(folder)
    assert (status.state, status.code) == ("running", None)
    assert status.where.startswith(f"process {command.pid} on ")
    assert cli.main(["cancel", f"run={folder}"]) == 0
    assert "saves a checkpoint and stops" in capsys.readouterr().out
    assert command.wait(10) == 75
    assert (find_status(folder).state, find_status(folder).code) == ("stopped", 75)
    assert cli.main(["cancel", f"run={folder}"]) == 2
    assert "does not run (stopped)" in capsys.readouterr().err


def test_now_ends_a_run_that_does_not_stop(trains) -> None:
    folder, command = trains(STUBBORN)
    assert cli.main(["cancel", f"run={folder}", "now=true"]) == 0
    assert command.poll() is not None
    assert (find_status(folder).state, find_status(folder).code) == ("failed", 143)


def test_a_killed_command_leaves_no_exit_code(trains) -> None:
    folder, command = trains(STOPS)
    command.kill()
    command.wait()
    assert (find_status(folder).state, find_status(folder).code) == ("ended", None)


@pytest.mark.parametrize(("code", "state"), [(0, "finished"), (75, "stopped"), (3, "failed")])
def test_the_exit_code_is_kept(tmp_path: Path, code: int, state: str) -> None:
    folder = write_run(tmp_path / "run")
    assert keep_exit(folder, lambda: code) == code
    assert find_status(folder).state == state


def test_an_errors_exit_code_is_kept(tmp_path: Path) -> None:
    def fail() -> int:
        raise MachineError.of("port", "is in use", "use another")

    folder = write_run(tmp_path / "run")
    with pytest.raises(MachineError):
        keep_exit(folder, fail)
    assert find_status(folder).code == 3


def stub(folder: Path, name: str, body: str) -> None:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f'#!/bin/sh\necho "{name} $*" >>{folder}/calls\n{body}\n')
    (folder / name).chmod(0o755)


@pytest.fixture
def job(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that is job 17, with stubs of SLURM's programs."""
    folder = write_run(tmp_path / "run", "slurm", 1, 2)
    (folder / "job.json").write_text('{"job": "17"}')
    monkeypatch.setenv("PATH", f"{tmp_path}/bin:/usr/bin:/bin")
    for name in ("scontrol", "scancel"):
        stub(tmp_path / "bin", name, "")
    return folder


def says(job: Path, state: str, more: str = "Reason=None Restarts=0 NodeList=n[1-2]") -> None:
    stub(job.parent / "bin", "scontrol", f'[ "$2" = show ] && echo "JobId=17 JobState={state} {more}" || true')


def calls(job: Path) -> list[str]:
    lines = (job.parent / "bin" / "calls").read_text().splitlines()
    return [line for line in lines if " show " not in line]


def test_states_of_jobs(job: Path) -> None:
    says(job, "PENDING", "Reason=Resources Restarts=0 NodeList=(null)")
    assert (find_status(job).state, find_status(job).where) == ("queued", "job 17, pending, Resources")
    says(job, "RUNNING", "Reason=None Restarts=2 NodeList=n[1-2]")
    assert (find_status(job).state, find_status(job).where) == ("running", "job 17, running, on n[1-2], restart 2")
    says(job, "CANCELLED")
    assert (find_status(job).state, find_status(job).code) == ("ended", None)
    stub(job.parent / "bin", "scontrol", "exit 1")  # SLURM has forgotten it
    assert find_status(job).state == "unknown"
    (job / "exit_code").write_text("0\n")
    assert find_status(job).state == "finished"
    stub(job.parent / "bin", "sacct", "echo 'CANCELLED by 0'")
    assert find_job("17") == SlurmJob("CANCELLED")


def test_a_running_job_is_asked_to_stop_and_does_not_start_again(job: Path) -> None:
    says(job, "RUNNING")
    assert cli.main(["cancel", f"run={job}"]) == 0
    assert calls(job) == ["scontrol update JobId=17 Requeue=0"]
    assert (job / "stop_requested").read_text() == "dist-ft cancel"


@pytest.mark.parametrize(("state", "words"), [("PENDING", []), ("RUNNING", ["now=true"])])
def test_jobs_that_are_cancelled_by_slurm(job: Path, state: str, words: list[str]) -> None:
    says(job, state)
    assert cli.main(["cancel", f"run={job}", *words]) == 0
    assert calls(job) == ["scancel 17"]
    assert not (job / "stop_requested").exists()


def test_what_slurm_refuses(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(job, "PENDING")
    stub(job.parent / "bin", "scancel", "echo 'Access denied' >&2; exit 1")
    assert cli.main(["cancel", f"run={job}"]) == 3
    assert "job 17: SLURM says: Access denied" in capsys.readouterr().err


def test_the_table_of_runs() -> None:
    root = Path("runs")
    runs = [
        Status(root / "first", "finished", "", 500, " of 500", 1.25, NOW - 200_000, 0),
        Status(root / "second", "running", "job 17", 12, ", epoch 0.80 of 3", 2.30258, NOW - 3, None),
        Status(root / "three/1-books", "failed", "", 0, " of 10", None, None, 4),
        Status(root / "fourth", "stopped", "", 7, " of 10", 3.5, NOW - 200, 75),
    ]
    check_golden("status.txt", "\n".join(table_lines(runs, root, NOW)) + "\n")


def test_status_of_one_and_of_all(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = write_run(tmp_path / "runs" / "first", "local", 1, 2, 3)
    (folder / "checkpoints" / "step-2").mkdir(parents=True)
    (folder / "exit_code").write_text("4\n")
    (folder / "failure.json").write_text(json.dumps({"exit_code": 4, "report": "dist-ft: training failed\n  step 3"}))
    os.utime(folder / "metrics.jsonl", (time.time() - 60, time.time() - 60))
    assert cli.main(["status", f"run={folder}"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1] == "  state   failed, exit code 4"
    assert lines[2].startswith("  step    3 of 20, loss 1.6250, 6")
    assert lines[3:] == ["  saved   step 2", "  dist-ft: training failed", "    step 3"]
    assert cli.main(["status", f"runs={tmp_path}/runs"]) == 0
    assert capsys.readouterr().out.splitlines()[1].split()[:3] == ["first", "failed", "(4)"]
    assert cli.main(["status", f"runs={tmp_path}/none"]) == 2
    assert cli.main(["status", f"run={tmp_path}/none"]) == 2
    assert cli.main(["status", "follow=true"]) == 2


def test_logs_are_the_end_of_what_was_said(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (job / "logs" / "job-17.log").write_text("".join(f"line {n}\n" for n in range(60)) + "half")
    (job / "logs" / "rank-1.log").write_text("of rank 1\n")
    assert cli.main(["logs", f"run={job}", "lines=2"]) == 0
    assert capsys.readouterr().out == "line 58\nline 59\n"
    assert cli.main(["logs", f"run={job}", "rank=1"]) == 0
    assert capsys.readouterr().out == "of rank 1\n"
    assert cli.main(["logs", f"run={job}", "rank=2"]) == 2
    (job / "job.json").unlink()
    assert cli.main(["logs", f"run={job}", "lines=1"]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == "step 2  loss 1.75  eval/loss 2.5"
    with pytest.raises(RequestError):
        find_status(job.parent)


def test_logs_follow_until_the_run_has_ended(job: Path, capsys: pytest.CaptureFixture[str]) -> None:
    says(job, "RUNNING")
    log = job / "logs" / "job-17.log"

    def train() -> None:
        time.sleep(0.3)
        with log.open("a") as file:
            file.write("one\ntwo\n")
        time.sleep(1)
        with log.open("a") as file:
            file.write("three\n")
        says(job, "COMPLETED")

    worker = threading.Thread(target=train)
    worker.start()
    assert cli.main(["logs", f"run={job}", "follow=true"]) == 0
    worker.join()
    assert capsys.readouterr().out == "one\ntwo\nthree\n"
