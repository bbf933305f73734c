"""Fixtures that start a real SLURM cluster and real ssh hosts on this machine, once per module."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT.parent / "shared" / "cluster"


def pytest_collection_modifyitems(items):
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.cluster)
            item.add_marker(pytest.mark.slow)


def put_up(script, *options):
    if not SCRIPTS.is_dir():
        pytest.skip("../shared/cluster with the scripts that start clusters does not exist")
    if os.geteuid() != 0:
        pytest.skip("starting a cluster requires root")
    folder = tempfile.mkdtemp(prefix="dist-ft-", dir="/tmp")  # the paths of sockets in it must be short
    run = subprocess.run([SCRIPTS / script, *options, f"{folder}/c"], capture_output=True, text=True, timeout=240)
    if run.returncode:
        shutil.rmtree(folder, ignore_errors=True)
        # CI installs all requirements, so a cluster that does not start is a failure there.
        end = pytest.fail if os.environ.get("CI") else pytest.skip
        end(f"{script} cannot start a cluster on this machine: {run.stderr.strip()[-300:]}")
    printed = subprocess.run(
        ["bash", "-c", run.stdout + '\nprintf "%s\\n" "$PATH" "${HOSTFILE:-}" "$CLUSTER_DIR"'],
        capture_output=True,
        text=True,
        check=True,
    )
    path, hostfile, cluster = printed.stdout.splitlines()
    return {"PATH": path, "HOSTFILE": hostfile, "CLUSTER_DIR": cluster}, folder


def take_down(variables, folder):
    subprocess.run([SCRIPTS / "slurm-down", variables["CLUSTER_DIR"]], check=False, timeout=60)
    shutil.rmtree(folder, ignore_errors=True)


@pytest.fixture(scope="module")
def slurm():
    variables, folder = put_up("slurm-up", "-n", "2", "-c", "4", "-g", "2")
    yield variables
    take_down(variables, folder)


@pytest.fixture(scope="module")
def hosts():
    variables, folder = put_up("hosts-up", "-n", "2", "-s", "2")
    yield variables
    take_down(variables, folder)


@pytest.fixture
def tiny_words(tmp_path, tiny_llama):
    """Return the arguments of a training run that takes seconds."""
    rows = ROOT / "dist_ft" / "data" / "support_desk" / "validation.jsonl"
    return [
        *(f"model.name_or_path={tiny_llama}", "data=jsonl", f"data.train={rows}", "track=off"),
        *("task.max_length=512", "task.overlong=drop", "train.max_steps=3", "train.global_batch_size=8"),
        *("train.per_device_train_batch_size=2", f"data.cache_dir={tmp_path / 'cache'}", "train.timeout_s=60"),
    ]
