"""Tests of `launch=deepspeed` on two hosts, over real ssh and pdsh."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = """
import sys
from dist_ft.launch import cli, deepspeed
deepspeed.WORKER_MODULE = "tests.unit.launch.stub_worker"
cli._prepare = lambda plan: 0
sys.exit(cli.main(sys.argv[1:]))
"""


@pytest.fixture
def env(hosts, tmp_path):
    extra = {"HF_HOME": f'{tmp_path}/a $(touch {tmp_path}/bad) `x` "100%" %h', "WANDB_API_KEY": "secret-1234"}
    path = f"{hosts['PATH']}:{Path(sys.executable).parent}"
    return {**os.environ, **extra, "PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def words_of(hosts, tmp_path, *more, hostfile=None):
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n')
    return [
        *("train", "launch=deepspeed", f"launch.hostfile={hostfile or hosts['HOSTFILE']}", "track=off"),
        *(f"output_dir={tmp_path}/run", "data=jsonl", f"data.train={rows}", *more),
    ]


def start(code, words, env):
    return subprocess.Popen(
        [sys.executable, "-c", code, *words],
        cwd=ROOT,
        env=env,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def said_by(folder):
    return {
        said["rank"]: said for said in (json.loads(file.read_text()) for file in sorted(folder.glob("said-*.json")))
    }


def stubs_running(folder):
    done = subprocess.run(["pgrep", "-f", f"stub_worker {folder}/run.yaml"], capture_output=True, text=True)
    return done.stdout.split()


def gone_within(folder, limit_s):
    end = time.monotonic() + limit_s
    while stubs_running(folder):
        if time.monotonic() > end:
            return False
        time.sleep(0.2)
    return True


def test_workers_start_on_both_hosts_with_their_environment_and_without_secrets(hosts, env, tmp_path):
    process = start(STUB, words_of(hosts, tmp_path), env)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    said = said_by(tmp_path / "run")
    assert [said[rank]["host"] for rank in range(4)] == ["n1", "n1", "n2", "n2"]
    for worker in said.values():
        assert worker["size"] == 4
        assert worker["env"]["MASTER_ADDR"] == "10.77.0.11"
        assert worker["env"]["OMP_NUM_THREADS"] == "1"
        assert worker["env"]["HF_HOME"] == env["HF_HOME"]
        assert worker["env"]["WANDB_API_KEY"] is None
    assert not (tmp_path / "bad").exists()
    assert "secret-1234" not in output + "".join(f.read_text() for f in (tmp_path / "run").iterdir() if f.is_file())


def test_a_failing_worker_ends_the_other_host_too_and_its_code_is_the_runs(hosts, env, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "run" / "fail-3").touch()
    began = time.monotonic()
    process = start(STUB, words_of(hosts, tmp_path), env)
    output, _ = process.communicate(timeout=100)
    failed = (tmp_path / "run" / "failure.json").stat().st_mtime
    assert process.returncode == 3, output
    assert time.time() - failed < 12, f"{time.monotonic() - began:.0f} s in all"
    assert gone_within(tmp_path / "run", 1)


@pytest.mark.faults
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(hosts, env, tmp_path, signum):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.yaml").touch()
    (tmp_path / "run" / "fail-9").touch()  # rank 9 does not exist, so all workers wait
    process = start(STUB, words_of(hosts, tmp_path), env)
    end = time.monotonic() + 60
    while len(said_by(tmp_path / "run")) < 4:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signum)
    if signum == signal.SIGINT:  # these workers do not look for a request to stop
        time.sleep(1)
        assert process.poll() is None
        process.send_signal(signum)
    process.wait(timeout=30)
    assert process.returncode == (130 if signum == signal.SIGINT else -9)
    assert gone_within(tmp_path / "run", 10)


def test_every_bad_host_is_named_before_anything_starts(hosts, env, tmp_path):
    hostfile = tmp_path / "hosts"
    hostfile.write_text("n1 slots=1\nnowhere slots=1\n10.77.0.99 slots=1\n")
    words = ["train.global_batch_size=12"]
    process = start(STUB, words_of(hosts, tmp_path, *words, hostfile=hostfile), env)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 3, output
    assert "nowhere: ssh cannot log in" in output
    assert "10.77.0.99: ssh cannot log in" in output
    assert "n1:" not in output
    assert not said_by(tmp_path / "run")


def test_a_signal_stops_the_workers_of_all_hosts_with_a_checkpoint(hosts, env, tmp_path, tiny_words):
    env = {**env, "HF_HOME": str(tmp_path / "hf")}
    words = ["train", "launch=deepspeed", f"launch.hostfile={hosts['HOSTFILE']}", "launch.workers_per_node=1"]
    words += ["engine=zero2", f"output_dir={tmp_path}/run", "train.max_steps=100000"]
    words += [word for word in tiny_words if not word.startswith("train.max_steps")]
    words += ["train.num_train_epochs=null", "train.save_minutes=60"]
    process = start("import sys; from dist_ft.launch.cli import main; sys.exit(main(sys.argv[1:]))", words, env)
    metrics, end = tmp_path / "run" / "metrics.jsonl", time.monotonic() + 120
    while not metrics.exists() or len(metrics.read_text().splitlines()) < 3:
        assert process.poll() is None and time.monotonic() < end, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 75, output
    last = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert f"SIGHUP: step {last} of 100000 is saved in a checkpoint" in output
    assert (tmp_path / "run" / "checkpoints" / f"step-{last}" / "manifest.json").exists()


def test_trains_for_real(hosts, env, tmp_path, tiny_words):
    env = {**env, "HF_HOME": str(tmp_path / "hf")}
    words = [
        "train",
        "launch=deepspeed",
        f"launch.hostfile={hosts['HOSTFILE']}",
        "launch.workers_per_node=1",
        "engine=zero2",
    ]
    words += [f"output_dir={tmp_path}/run", *tiny_words]
    process = start("import sys; from dist_ft.launch.cli import main; sys.exit(main(sys.argv[1:]))", words, env)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 0, output
    steps = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [step["step"] for step in steps if "train/loss" in step] == [1, 2, 3]
    assert (tmp_path / "run" / "logs" / "rank-1.log").exists()
    assert any((tmp_path / "run" / "model").iterdir())
