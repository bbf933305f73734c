"""One start owns a run's folder, until it ends in whatever way."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dist_ft.errors import RequestError
from dist_ft.process import owner

HOLD = """
import sys, time
from pathlib import Path
from dist_ft.process import owner
if sys.argv[2] == "worker":
    owner.own(Path(sys.argv[1]))
    print("owns", flush=True); time.sleep(60)
with owner.command_owns(Path(sys.argv[1])):
    print("owns", flush=True); time.sleep(60)
"""


def hold(folder: Path, role: str) -> subprocess.Popen[str]:
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(folder), role], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "owns\n"
    return process


def is_free(folder: Path) -> bool:
    try:
        with owner.command_owns(folder):
            return True
    except RequestError:
        return False


@pytest.mark.parametrize("role", ["worker", "command"])
def test_a_second_start_is_refused_and_told_who_owns_the_folder(
    role: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(owner, "ENDING_S", 0.2)
    process = hold(tmp_path, role)
    with (
        pytest.raises(RequestError, match=f"in use by another start of this run .process {process.pid} on "),
        owner.command_owns(tmp_path),
    ):
        pass
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert is_free(tmp_path)


def test_the_command_and_its_worker_own_the_folder_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(owner, "ENDING_S", 0.2)
    with owner.command_owns(tmp_path):
        worker = hold(tmp_path, "worker")
    assert not is_free(tmp_path), "the command has ended, its worker has not"
    worker.kill()
    worker.wait()


def test_a_start_waits_for_workers_that_are_ending(tmp_path: Path) -> None:
    worker = hold(tmp_path, "worker")
    killer = subprocess.Popen([sys.executable, "-c", f"import os, time; time.sleep(0.7); os.kill({worker.pid}, 9)"])
    began = time.monotonic()
    assert is_free(tmp_path) and 0.3 < time.monotonic() - began < owner.ENDING_S
    killer.wait()
    worker.wait()


def test_the_lock_alone_makes_no_run_folder(tmp_path: Path) -> None:
    with owner.command_owns(tmp_path / "run"):
        pass
    assert [path.name for path in (tmp_path / "run").iterdir()] == [".lock"]


def test_a_file_system_without_locks_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def lockf(handle: int, command: int, length: int, start: int) -> None:
        if command & fcntl.LOCK_EX:
            raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", lockf)
    assert is_free(tmp_path)
    assert "has no locks; start this run only once" in capsys.readouterr().err
