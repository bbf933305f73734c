"""Tests of the real launchers with workers without torch: exit codes, and no process left behind."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.unit.launch.plans import ROWS

pytestmark = [pytest.mark.dist, pytest.mark.slow, pytest.mark.faults]
ROOT = Path(__file__).resolve().parents[3]
STUB = """
import sys
from dist_ft.launch import cli, local
local.WORKER_MODULE = "tests.unit.launch.stub_worker"
cli._prepare = lambda plan: 0
sys.exit(cli.main(sys.argv[1:]))
"""


def start(folder, engine, *, fail):
    run_dir = folder / "run"
    run_dir.mkdir()
    (run_dir / "run.yaml").touch()
    if fail is not None:
        (run_dir / f"fail-{fail}").touch()
    (folder / "rows.jsonl").write_text(ROWS)
    words = ["train", f"engine={engine}", f"output_dir={run_dir}", "data=jsonl", f"data.train={folder}/rows.jsonl"]
    command = [sys.executable, "-c", STUB, *words, "launch.workers_per_node=2", "track=off"]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    return subprocess.Popen(command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def left(folder):
    found = subprocess.run(["pgrep", "-f", f"stub_worker {folder}/run/run.yaml"], capture_output=True, text=True)
    return found.stdout.split()


def both_run(folder, process):
    end = time.monotonic() + 60
    while len(list((folder / "run").glob("said-*.json"))) < 2:
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < end
        time.sleep(0.05)


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_a_run_that_succeeds(tmp_path, engine):
    process = start(tmp_path, engine, fail=None)
    output, _ = process.communicate(timeout=100)
    assert process.returncode == 0, output
    assert len(list((tmp_path / "run").glob("said-*.json"))) == 2


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
def test_a_failing_worker_ends_all_with_its_code(tmp_path, engine):
    process = start(tmp_path, engine, fail=1)
    output, _ = process.communicate(timeout=100)
    assert time.time() - (tmp_path / "run" / "failure.json").stat().st_mtime < 10
    assert process.returncode == 3, output
    assert "Traceback" not in output
    assert left(tmp_path) == []


@pytest.mark.parametrize("engine", ["fsdp", "zero2"])
@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGKILL])
def test_no_worker_outlives_the_command(tmp_path, engine, signum):
    process = start(tmp_path, engine, fail=9)  # rank 9 does not exist, so both workers wait
    both_run(tmp_path, process)
    process.send_signal(signum)
    process.wait(timeout=20)
    assert process.returncode == (75 if signum == signal.SIGINT else -9)
    end = time.monotonic() + 10
    while left(tmp_path):
        assert time.monotonic() < end, left(tmp_path)
        time.sleep(0.1)
