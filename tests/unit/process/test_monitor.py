"""The monitor of a worker names it when it dies, is stopped, or makes no progress, and only then."""

from __future__ import annotations

import json
import mmap
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from dist_ft.process import monitor
from dist_ft.process.monitor import BOARD_BYTES, About, Monitor, describe_end, interval, read, read_crash, write

TIMEOUT_S = 0.8
STACK = ["train.py:7 step", "nfs.py:3 read"]


class Watched:
    """A process that sleeps, its monitor, and the pipe between them, whose worker's end is here."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.worker = subprocess.Popen(
            [sys.executable, "-c", "import time; print(flush=True); time.sleep(60)"], stdout=-1
        )
        self.worker.stdout.readline()
        heard, self.pipe = os.pipe()
        self.monitor = Monitor(heard, self.worker.pid, board := mmap.mmap(-1, BOARD_BYTES), self.find)
        write(board, "step 3")

    def find(self) -> About:
        return About(1, 2, "host-1", str(self.folder), TIMEOUT_S, os.getpid())

    def about(self, parent: int) -> None:
        self.tell(asdict(About(1, 2, "host-1", str(self.folder), TIMEOUT_S, parent)))

    def tell(self, what: dict[str, Any]) -> None:
        os.write(self.pipe, json.dumps(what).encode() + b"\n")

    def beat(self, progress: int = 0, *, shared: bool = True) -> None:
        self.tell({"progress": progress, "stack": STACK, "shared": shared})

    def report(self) -> str | None:
        """Let the monitor run until it ends; return the report that it claimed."""
        self.monitor.run()
        path = self.folder / "failure.json"
        return json.loads(path.read_text())["report"] if path.exists() else None


@pytest.fixture
def watched(tmp_path: Path) -> Iterator[Watched]:
    one = Watched(tmp_path)
    one.about(os.getpid())
    yield one
    one.worker.kill()
    one.worker.wait()
    os.close(one.pipe)


def test_a_worker_without_heartbeat_is_named_with_its_stack_and_killed(watched: Watched, capfd) -> None:
    watched.beat()
    report = watched.report()
    assert report is not None and "no heartbeat for 0.8 s: rank 1 on host-1 at step 3" in report
    assert "nfs.py:3 read" in report and report in capfd.readouterr().err
    assert watched.worker.wait(5) == -signal.SIGKILL


@pytest.mark.parametrize(
    ("moves", "shared", "named"), [(False, False, True), (True, False, False), (False, True, False)]
)
def test_progress_is_judged_only_while_ranks_do_not_watch_each_other(
    watched: Watched, moves: bool, shared: bool, named: bool
) -> None:
    def beat() -> None:
        for i in range(20):
            watched.beat(i if moves else 0, shared=shared)
            time.sleep(TIMEOUT_S / 8)
        watched.tell({"left": True})

    thread = threading.Thread(target=beat)
    thread.start()
    report = watched.report()
    thread.join()
    assert (report is not None) == named
    if report is not None:
        assert "no progress for 0.8 s: rank 1 on host-1 at step 3" in report


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGSEGV])
def test_a_worker_that_dies_is_named_with_its_signal(watched: Watched, number: signal.Signals) -> None:
    watched.beat()
    watched.worker.send_signal(number)
    report = watched.report()
    assert report is not None and f"rank 1 on host-1: was killed by {number.name} at step 3" in report
    assert "nfs.py:3 read" in report and "rank-1.log" in report


def test_a_worker_that_stops_or_dies_before_it_has_told_about_itself_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(monitor, "BEGIN_S", 0.1)
    for name, words in (("a", "no heartbeat for 0.8 s: rank 1 on host-1"), ("b", "rank 1 on host-1: was killed by")):
        one = Watched(tmp_path / name)
        if name == "b":
            one.worker.kill()
        report = one.report()
        assert report is not None and words in report
        one.worker.wait()
        os.close(one.pipe)


def test_a_worker_that_left_says_so(watched: Watched) -> None:
    watched.tell({"left": True})
    assert watched.report() is None


@pytest.mark.parametrize("code", [2, 3, 4, 75])
def test_exit_codes_of_workers_that_reported_are_no_deaths(tmp_path: Path, code: int) -> None:
    worker = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.read(0, 1); os._exit({code})"], stdin=subprocess.PIPE
    )
    heard, pipe = os.pipe()
    about = About(0, 1, "a", str(tmp_path), 60, os.getpid())
    one = Monitor(heard, worker.pid, mmap.mmap(-1, BOARD_BYTES), lambda: about)
    os.write(pipe, json.dumps(asdict(about)).encode() + b"\n")
    assert worker.stdin is not None
    worker.stdin.close()
    one.run()
    assert worker.wait() == code and not (tmp_path / "failure.json").exists()
    os.close(pipe)


def test_a_worker_that_ended_with_its_launcher_is_not_reported(tmp_path: Path) -> None:
    launcher = subprocess.Popen(["true"])
    launcher.wait()
    one = Watched(tmp_path)
    one.about(launcher.pid)
    one.worker.kill()
    assert one.report() is None
    os.close(one.pipe)
    one.worker.wait()


def test_a_monitor_that_was_stopped_with_its_worker_begins_anew(watched: Watched) -> None:
    watched.monitor._read()
    for name in ("_heard_at", "_moved_at", "_looked_at"):
        setattr(watched.monitor, name, time.monotonic() - 3600)
    assert watched.monitor.about is not None and not watched.monitor._judge(watched.monitor.about)
    assert time.monotonic() - watched.monitor._heard_at < TIMEOUT_S


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (-11, "was killed by SIGSEGV"),
        (-40, "was killed by signal 40"),
        (1, "left with exit code 1"),
        (None, "was killed or left"),
    ],
)
def test_how_a_process_ended(code: int | None, words: str) -> None:
    assert describe_end(code) == words


def test_the_stack_of_a_crash_is_that_of_its_thread(tmp_path: Path) -> None:
    log = tmp_path / "rank-0.log"
    code = "import faulthandler, ctypes\nfaulthandler.enable()\ndef fall(): ctypes.string_at(0)\nfall()"
    script = tmp_path / "fall.py"
    script.write_text(code)
    with log.open("w") as file:
        subprocess.run([sys.executable, str(script)], stderr=file, check=False)
    first, *frames = read_crash(log)
    assert first == "Fatal Python error: Segmentation fault"
    assert any('fall.py", line 3 in fall' in frame for frame in frames)
    assert read_crash(tmp_path / "missing.log") == []


def test_a_board_shows_the_last_phase_whatever_its_length() -> None:
    board = mmap.mmap(-1, BOARD_BYTES)
    assert read(board) == "start"
    write(board, "x" * (2 * BOARD_BYTES))
    assert read(board) == "x" * (BOARD_BYTES - 1)
    write(board, "step é")
    assert read(board) == "step é"


def test_heartbeats_are_far_more_frequent_than_deadlines() -> None:
    assert interval(600) == 1.0 and interval(4) == 0.5
