"""What a worker tells about its main thread."""

from __future__ import annotations

import importlib
import sys
import threading
import time
from pathlib import Path

import pytest

from dist_ft.process import pulse
from dist_ft.process.pulse import Pulse, is_waiting

GATHER = "/site-packages/torch/distributed/distributed_c10d.py:4000 all_gather"
WRITE = "/site-packages/torch/distributed/checkpoint/filesystem.py:450 _write_item"
JOIN = "/code/dist_ft/process/comm.py:75 join"


@pytest.mark.parametrize(
    ("stack", "waits"),
    [
        ([GATHER], True),
        ([JOIN], True),
        ([GATHER, WRITE], False),
        (["/site-packages/torch/distributed/__init__.py:9 <module>", "<frozen importlib._bootstrap>:1 _load"], False),
        (["loop.py:3 fit"], False),
    ],
)
def test_stacks_that_wait_for_other_ranks(stack: list[str], waits: bool) -> None:
    assert is_waiting(stack) == waits


def test_ticks_are_progress_and_only_beats_are_counted() -> None:
    one = Pulse()
    one.beat("step 1")
    one.tick("a tensor")
    assert (one.count, one.progress, one.phase) == (1, 2, "a tensor")


def test_the_stack_ends_in_the_main_thread() -> None:
    found: list[list[str]] = []
    one = Pulse()
    thread = threading.Thread(target=lambda: found.append(one.stack()))
    thread.start()
    thread.join()
    assert any("test_the_stack_ends_in_the_main_thread" in frame for frame in found[0])
    assert not any("<lambda>" in frame for frame in found[0])


def test_the_main_thread_is_seen_to_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also while the module calls functions of others, deeper than a stack is shown."""
    monkeypatch.syspath_prepend(tmp_path)
    code = "import pulse_probe_of\ndef deep(n): return deep(n - 1) if n else pulse_probe_of.ask()\nfound = deep(20)"
    (tmp_path / "pulse_probe.py").write_text(code)
    one = Pulse()
    monkeypatch.setitem(sys.modules, "pulse_probe_of", type("Probe", (), {"ask": staticmethod(one._imports)}))
    assert not one._imports()
    assert importlib.import_module("pulse_probe").found


@pytest.mark.skipif(sys.platform != "linux", reason="other systems have no /proc")
def test_a_main_thread_that_waits_for_a_file_does_not_move() -> None:
    """Asked from another thread while this one sleeps, as a heartbeat is; what it did before is known by then."""
    one, moved = Pulse(), []

    def ask() -> None:
        one._has_moved(1.0)
        for _ in range(3):
            time.sleep(0.05)
            moved.append(one._has_moved(1.0))

    thread = threading.Thread(target=ask)
    thread.start()
    time.sleep(0.4)
    thread.join()
    assert not moved[-1]


def test_a_thread_that_computes_moves(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pulse, "count_switches", lambda: 7)
    one = Pulse()
    one._has_moved(1.0)
    assert not one._has_moved(1.0)
    thread = threading.Thread(target=lambda: sum(i * i for i in range(1_000_000)))
    thread.start()
    thread.join()
    assert one._has_moved(1.0)


def test_without_a_monitor_nothing_is_told(tmp_path: Path) -> None:
    Pulse().leave()
