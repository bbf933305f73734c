"""Tests of `dist-ft submit launch=slurm` on two nodes of a real SLURM cluster."""

import json
import time

import pytest

from tests.cluster.jobs import Submitted, environment, identity_of, run_cli
from tests.faults.jobs import INJECT

STUB = """
import sys
from dist_ft.launch import cli
from dist_ft.launch.slurm import script
script.WORKER_MODULE = "tests.unit.launch.stub_worker"
cli._prepare = lambda plan: 0
sys.exit(cli.main(sys.argv[1:]))
"""
REAL = "import sys; from dist_ft.launch.cli import main; sys.exit(main(sys.argv[1:]))"
TWO_NODES = ["submit", "launch=slurm", "launch.nodes=2", "launch.gpus_per_node=0"]


@pytest.fixture
def env(slurm):
    return environment(slurm)


def stub_words(tmp_path, *more):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return [*TWO_NODES, "track=off", f"output_dir={tmp_path}/run", "data=jsonl", f"data.train={rows}", *more]


@pytest.mark.parametrize("own", ["launch.cpus_per_task=2", "launch.tasks_per_node=1"])
def test_workers_run_on_both_nodes(slurm, env, tmp_path, own):
    """As tasks, and below a torchrun on each node."""
    run = run_cli(STUB, stub_words(tmp_path, "launch.workers_per_node=2", own), env)
    job = Submitted(identity_of(run), tmp_path / "run", slurm)
    assert f"tail -F {tmp_path}/run/logs/job-{job.identity}.log" in run.stdout
    assert job.finish(60) == ("COMPLETED", 0), job.log
    said = sorted(
        (json.loads(file.read_text()) for file in (tmp_path / "run").glob("said-*.json")), key=lambda s: s["rank"]
    )
    assert [(worker["rank"], worker["size"], worker["host"]) for worker in said] == [
        *((0, 4, "n1"), (1, 4, "n1"), (2, 4, "n2"), (3, 4, "n2")),
    ]
    assert {worker["env"]["MASTER_ADDR"] for worker in said} == {"n1"}
    assert {worker["env"]["MASTER_PORT"] for worker in said} == {str(20000 + int(job.identity))}
    assert {worker["env"]["STUB_WORD"] for worker in said} == {"heard"}


def test_a_failing_worker_ends_the_job_with_its_code(slurm, env, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "run" / "fail-1").touch()
    began = time.monotonic()
    run = run_cli(STUB, stub_words(tmp_path, "launch.workers_per_node=1"), env)
    assert Submitted(identity_of(run), tmp_path / "run", slurm).finish(60) == ("FAILED", 3)
    assert time.monotonic() - began < 40


def test_what_slurm_refuses_is_said_in_its_words(slurm, env, tmp_path):
    run = run_cli(STUB, stub_words(tmp_path, "launch.workers_per_node=1", "launch.partition=none"), env)
    assert run.returncode == 3
    assert "SLURM rejects the job: " in run.stderr
    assert "invalid partition" in run.stderr.lower()
    words = [word for word in stub_words(tmp_path, "launch.workers_per_node=1") if word != "launch.gpus_per_node=0"]
    assert run_cli(STUB, [*words, "launch.gpus_per_node=3"], env).returncode == 3  # each node has 2 GPUs


def test_trains_for_real(slurm, env, tmp_path, tiny_words):
    words = [*TWO_NODES, "launch.workers_per_node=1", "engine=fsdp", f"output_dir={tmp_path}/run", *tiny_words]
    job = Submitted(identity_of(run_cli(REAL, words, env)), tmp_path / "run", slurm)
    assert job.finish(240) == ("COMPLETED", 0), job.log
    assert job.steps == [1, 2, 3]
    assert (tmp_path / "run" / "logs" / "rank-1.log").exists()
    assert any((tmp_path / "run" / "model").iterdir())


def test_a_rank_that_is_killed_is_named_by_its_node(slurm, env, tmp_path, tiny_words):
    """srun takes the exit code of a task at once, and the tasks have no launcher of ours above them."""
    env = {**env, "PYTHONPATH": f"{INJECT}:{env['PYTHONPATH']}", "DIST_FT_FAULT_MARK": str(tmp_path / "mark")}
    words = [*TWO_NODES, "launch.workers_per_node=1", "engine=ddp", f"output_dir={tmp_path}/run", *tiny_words]
    run = run_cli(REAL, words, env | {"DIST_FT_FAULT": "kill:1:3"})
    job = Submitted(identity_of(run), tmp_path / "run", slurm)
    assert job.finish(120) == ("FAILED", 4), job.log
    record = json.loads((tmp_path / "run" / "failure.json").read_text())
    assert (record["rank"], record["host"], record["kind"]) == (1, "n2", "died"), record
    assert "was killed" in record["report"] and "at step 2" in record["report"] and record["report"] in job.log
