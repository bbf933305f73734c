"""Tests of `dist-ft submit launch=slurm` on two nodes of a real SLURM cluster."""

import json
import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """
import sys
from dist_ft.launch import cli, slurm
slurm.WORKER_MODULE = "tests.unit.launch.stub_worker"
cli._prepare = lambda plan: 0
sys.exit(cli.main(sys.argv[1:]))
"""
REAL = "import sys; from dist_ft.launch.cli import main; sys.exit(main(sys.argv[1:]))"
TWO_NODES = ["submit", "launch=slurm", "launch.nodes=2", "launch.gpus_per_node=0"]


@pytest.fixture
def env(slurm):
    path = f"{slurm['PATH']}:{Path(sys.executable).parent}"
    return {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "STUB_WORD": "heard"}


def stub_words(tmp_path, *more):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return [*TWO_NODES, "track=off", f"output_dir={tmp_path}/run", "data=jsonl", f"data.train={rows}", *more]


def submit(code, words, env):
    return subprocess.run(
        [sys.executable, "-c", code, *words], cwd=ROOT, env=env, capture_output=True, text=True, timeout=200
    )


def finish(identity, env, limit_s):
    """Wait until a job has ended; return its state and exit code."""
    end = time.monotonic() + limit_s
    while True:
        shown = subprocess.run(["scontrol", "show", "job", identity], env=env, capture_output=True, text=True).stdout
        state = re.search(r"JobState=(\w+)", shown)[1]
        if state not in ("PENDING", "RUNNING", "CONFIGURING", "COMPLETING"):
            return state, int(re.search(r"ExitCode=(\d+):", shown)[1])
        assert time.monotonic() < end, shown
        time.sleep(0.3)


def identity_of(run):
    assert run.returncode == 0, run.stderr
    return re.match(r"job (\d+):", run.stdout)[1]


def test_tasks_are_workers_on_both_nodes(slurm, env, tmp_path):
    run = submit(STUB, stub_words(tmp_path, "launch.workers_per_node=2", "launch.cpus_per_task=2"), env)
    identity = identity_of(run)
    assert f"tail -F {tmp_path}/run/logs/job-{identity}.log" in run.stdout
    log = tmp_path / "run" / "logs" / f"job-{identity}.log"
    assert finish(identity, env, 60) == ("COMPLETED", 0), log.read_text()
    said = sorted(
        (json.loads(file.read_text()) for file in (tmp_path / "run").glob("said-*.json")), key=lambda s: s["rank"]
    )
    assert [(worker["rank"], worker["size"], worker["host"]) for worker in said] == [
        *((0, 4, "n1"), (1, 4, "n1"), (2, 4, "n2"), (3, 4, "n2")),
    ]
    assert {worker["env"]["MASTER_ADDR"] for worker in said} == {"n1"}
    assert {worker["env"]["STUB_WORD"] for worker in said} == {"heard"}


def test_a_failing_worker_ends_the_job_with_its_code(slurm, env, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "run" / "fail-1").touch()
    began = time.monotonic()
    identity = identity_of(submit(STUB, stub_words(tmp_path, "launch.workers_per_node=1"), env))
    assert finish(identity, env, 60) == ("FAILED", 3)
    assert time.monotonic() - began < 40


def test_what_slurm_refuses_is_said_in_its_words(slurm, env, tmp_path):
    run = submit(STUB, stub_words(tmp_path, "launch.workers_per_node=1", "launch.partition=none"), env)
    assert run.returncode == 3
    assert "SLURM rejects the job: " in run.stderr
    assert "invalid partition" in run.stderr.lower()
    words = [word for word in stub_words(tmp_path, "launch.workers_per_node=1") if word != "launch.gpus_per_node=0"]
    assert submit(STUB, [*words, "launch.gpus_per_node=3"], env).returncode == 3  # each node has 2 GPUs


def test_trains_for_real(slurm, env, tmp_path, tiny_words):
    words = [*TWO_NODES, "launch.workers_per_node=1", "engine=fsdp", f"output_dir={tmp_path}/run", *tiny_words]
    identity = identity_of(submit(REAL, words, env))
    log = tmp_path / "run" / "logs" / f"job-{identity}.log"
    assert finish(identity, env, 240) == ("COMPLETED", 0), log.read_text()
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "train/loss" in step] == [1, 2, 3]
    assert (tmp_path / "run" / "logs" / "rank-1.log").exists()
    assert any((tmp_path / "run" / "model").iterdir())


def test_a_job_stops_before_its_time_limit_and_at_a_signal_and_goes_on(slurm, env, tmp_path, tiny_words):
    """The first job ends before its limit, the second at a signal to the batch script, as `--signal=B:` sends it."""
    given = [word for word in tiny_words if not word.startswith("train.max_steps")]
    words = [*TWO_NODES, "launch.workers_per_node=1", "engine=fsdp", f"output_dir={tmp_path}/run", *given]
    words += ["train.num_train_epochs=null", "train.max_steps=100000", "train.logging_steps=1", "train.save_minutes=60"]
    steps = []
    for more in (["launch.time=00:01:00", "train.stop_before_s=15"], ["launch.time=00:10:00"]):
        identity = identity_of(submit(REAL, [*words, *more], env))
        log = tmp_path / "run" / "logs" / f"job-{identity}.log"
        if steps:
            end = time.monotonic() + 120
            while last_step(tmp_path / "run") <= steps[-1] + 2:
                assert time.monotonic() < end, log.read_text()
                time.sleep(0.3)
            subprocess.run(["scancel", "--batch", "--signal=USR1", identity], env=env, check=True)
        assert finish(identity, env, 200) == ("FAILED", 75), log.read_text()
        steps.append(last_step(tmp_path / "run"))
        cause = "SIGUSR1" if len(steps) == 2 else "time limit of the job"
        assert f"{cause}: step {steps[-1]} of 100000 is saved in a checkpoint" in log.read_text()
    assert 0 < steps[0] < steps[1]
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, steps[1] + 1))


def test_a_preempted_job_is_requeued_and_goes_on_where_it_stopped(slurm, env, tmp_path, tiny_words):
    """Its tasks receive SIGTERM, as at a preemption."""
    code = "from dist_ft.launch import slurm; slurm.TEMPLATE = slurm.SLURM_DIR / 'preemption.sbatch'\n" + REAL
    given = [word for word in tiny_words if not word.startswith("train.max_steps")]
    words = [*TWO_NODES, "launch.workers_per_node=1", "engine=fsdp", f"output_dir={tmp_path}/run", *given]
    words += ["train.num_train_epochs=null", "train.max_steps=100000", "train.save_minutes=60"]
    identity = identity_of(submit(code, words, env))
    log = tmp_path / "run" / "logs" / f"job-{identity}.log"

    def wait_for_step(step):
        end = time.monotonic() + 120
        while last_step(tmp_path / "run") < step:
            assert time.monotonic() < end, log.read_text()
            time.sleep(0.3)

    wait_for_step(3)
    subprocess.run(["scancel", "--signal=TERM", identity], env=env, check=True)
    end = time.monotonic() + 90
    while not (saved := re.search(r"SIGTERM: step (\d+) of 100000 is saved", log.read_text())):
        assert time.monotonic() < end, log.read_text()
        time.sleep(0.3)
    stopped = int(saved[1])
    wait_for_step(stopped + 2)
    subprocess.run(["scancel", identity], env=env, check=True)
    assert f"resuming from the checkpoint of step {stopped}" in log.read_text()
    assert "start 1 on n[1-2]" in log.read_text()
    lines = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert lines == list(range(1, lines[-1] + 1))


def last_step(folder):
    lines = (folder / "metrics.jsonl").read_text().splitlines() if (folder / "metrics.jsonl").exists() else []
    return json.loads(lines[-1])["step"] if lines else 0
