"""A launcher passes signals on to its workers, waits for them, and leaves ignored signals ignored."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.process.stop import SIGNALS

ROOT = Path(__file__).resolve().parents[3]
# A launcher that would kill its workers, and ends with the exit code of the worker.
LAUNCHER = """
import signal, subprocess, sys
for number in (1, 2, 10, 12, 15):
    signal.signal(number, lambda *_: sys.exit(1))
print("launcher", flush=True)
{before}
worker = subprocess.Popen([sys.executable, "-c", open("worker.py").read()])
sys.exit(worker.wait())
"""
# A worker that takes a while until it listens, and then to end.
WORKER = """
import json, os, pathlib, signal, sys, time
ignored = [n for n in (1, 2, 10, 12, 15) if signal.getsignal(n) is signal.SIG_IGN]
pathlib.Path("ignored").write_text(json.dumps(ignored))
print("worker", flush=True)
time.sleep(0.5)
heard = []
for number in (1, 2, 10, 12, 15):
    signal.signal(number, lambda number, _: heard.append(number))
signal.pthread_sigmask(signal.SIG_UNBLOCK, (1, 2, 10, 12, 15))
while not heard:
    time.sleep(0.05)
time.sleep(0.5)
pathlib.Path("heard").write_text(json.dumps(heard))
os._exit(75)
"""


def start(folder, before="", **options):
    (folder / "launcher.py").write_text(LAUNCHER.format(before=before))
    (folder / "worker.py").write_text(WORKER)
    return subprocess.Popen(
        [sys.executable, "-m", "dist_ft.launch.forward", "launcher"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}:{folder}"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_reaches_a_worker_even_before_it_listens(tmp_path, number):
    process = start(tmp_path)
    assert [process.stdout.readline() for _ in range(2)] == ["launcher\n", "worker\n"]
    process.send_signal(number)
    process.communicate(timeout=20)
    assert process.returncode == 75
    assert json.loads((tmp_path / "heard").read_text()) == [number]


def test_without_workers_the_launcher_ends(tmp_path):
    process = start(tmp_path, before="import time; time.sleep(60)")
    assert process.stdout.readline() == "launcher\n"
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=20)
    assert process.returncode == 75
    assert "SIGTERM: no worker was started yet, so nothing is lost" in said


def test_an_ignored_signal_stays_ignored(tmp_path):
    process = start(tmp_path, preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))
    assert [process.stdout.readline() for _ in range(2)] == ["launcher\n", "worker\n"]
    process.send_signal(signal.SIGHUP)
    time.sleep(1.0)
    assert process.poll() is None
    assert signal.SIGHUP in json.loads((tmp_path / "ignored").read_text())
    process.send_signal(signal.SIGUSR2)
    process.communicate(timeout=20)
    assert json.loads((tmp_path / "heard").read_text()) == [signal.SIGUSR2]
