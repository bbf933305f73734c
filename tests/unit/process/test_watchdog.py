"""The watchdog ends a run in which no rank makes progress, and names the rank that is waited for."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from torch.distributed import HashStore, Store

from dist_ft.process import failure, watchdog
from dist_ft.process.place import Place
from dist_ft.process.pulse import Pulse
from dist_ft.process.watchdog import Watchdog

TIMEOUT_S = 0.8


class Doing(Pulse):
    """A pulse whose main thread is said to be in `frames`."""

    def __init__(self, frames: str) -> None:
        super().__init__()
        self.frames = [frames]

    def stack(self) -> list[str]:
        return self.frames


class Rank(Watchdog):
    """A watchdog of one of several ranks in this process; `stack` is what its main thread is said to be in."""

    def __init__(self, rank: int, world: int, store: Store, folder: Path, stack: str = "loop.py:1 fit") -> None:
        place = Place(rank, world, rank, f"host-{rank}")
        super().__init__(place, Doing(stack), store, TIMEOUT_S, folder, sys.stderr)
        self.report: str | None = None
        self.named: int | None = None
        self.reported_at = float("inf")

    def _end(self, error: Any, place: Place, patience_s: float = 0.0) -> None:
        self.report, self.named = failure.describe(error, place, self.run_dir), place.rank
        self.reported_at = time.monotonic()
        self._ended.set()


def watch(ranks: list[Rank], work: Callable[[], None] = lambda: None, seconds: float = 5 * TIMEOUT_S) -> str | None:
    """Let the ranks watch, and call `work` over and over, until one ends the run; return its report."""
    for rank in ranks:
        rank.start()
    until = time.monotonic() + seconds
    while time.monotonic() < until and not any(rank.report for rank in ranks):
        work()
        time.sleep(0.05)
    for rank in ranks:
        rank.close()
    return min(ranks, key=lambda rank: rank.reported_at).report


WAITS = "/site-packages/torch/distributed/distributed_c10d.py:4000 barrier"


def test_ranks_that_wait_for_one_that_works_are_healthy(tmp_path: Path) -> None:
    store = HashStore()
    ranks = [Rank(0, 3, store, tmp_path), *(Rank(r, 3, store, tmp_path, WAITS) for r in (1, 2))]
    assert watch(ranks, lambda: ranks[0].pulse.tick("exporting a tensor")) is None


def test_a_rank_that_hangs_outside_collectives_is_named_however_much_others_ticked(tmp_path: Path) -> None:
    store = HashStore()
    ranks = [Rank(0, 2, store, tmp_path, WAITS), Rank(1, 2, store, tmp_path, "nfs.py:7 read")]
    for _ in range(50):
        ranks[0].pulse.tick("a tensor loaded on rank 0 only")
    report = watch(ranks)
    assert report is not None and "no progress" in report and "rank 1 on host-1" in report
    assert "nfs.py:7" in report and "rank 0 on host-0" not in report


def test_of_ranks_in_collectives_those_behind_are_named(tmp_path: Path) -> None:
    store = HashStore()
    ranks = [Rank(r, 2, store, tmp_path, WAITS) for r in range(2)]
    ranks[1].pulse.beat("step 7")
    for _ in range(50):
        ranks[0].pulse.tick("progress inside a phase does not count as a phase")
    report = watch(ranks)
    assert report is not None and "rank 0 on host-0 at" in report and "rank 1 on host-1 at" not in report


def test_writing_a_checkpoint_is_no_collective(tmp_path: Path) -> None:
    store, writes = HashStore(), "/site-packages/torch/distributed/checkpoint/filesystem.py:450 _write_item"
    ranks = [Rank(0, 2, store, tmp_path, WAITS), Rank(1, 2, store, tmp_path, writes)]
    report = watch(ranks)
    assert report is not None and "rank 1 on host-1 at" in report and "rank 0 on host-0 at" not in report


def test_a_rank_that_publishes_no_more_is_named_while_others_work(tmp_path: Path) -> None:
    store = HashStore()
    ranks = [Rank(r, 2, store, tmp_path) for r in range(2)]
    ranks[1]._publish("runs")  # and never again: the process was stopped
    report = watch(ranks[:1], lambda: ranks[0].pulse.tick("work"))
    assert report is not None and "no heartbeat" in report and "rank 1 on host-1" in report
    assert ranks[0].named == 1, "the report is of the rank that is waited for"


class Gone(HashStore):
    """A store whose host is gone from some time on."""

    is_gone = False

    def set(self, key: str, value: str) -> None:
        if self.is_gone:
            raise RuntimeError("Broken pipe")
        super().set(key, value)


@pytest.mark.parametrize("works", [True, False])
def test_without_the_store_a_rank_watches_itself(tmp_path: Path, works: bool) -> None:
    store = Gone()
    rank = Rank(1, 2, store, tmp_path)
    threading.Timer(0.3, lambda: setattr(store, "is_gone", True)).start()
    report = watch([rank], lambda: rank.pulse.tick("step 3") if works else None)
    assert (report is None) == works
    if report is not None:
        assert "no contact with rank 0" in report


def test_a_rank_that_has_waited_for_the_store_does_not_wait_once_more(tmp_path: Path) -> None:
    rank = Rank(1, 2, HashStore(), tmp_path)
    rank.timeout_s = 3600  # another one would take an hour
    rank._own_moved_at = time.monotonic() - 3601
    rank._watch_alone()
    assert rank.report is not None and "no contact with rank 0" in rank.report


def test_a_job_that_was_stopped_as_a_whole_goes_on(tmp_path: Path) -> None:
    rank = Rank(0, 1, HashStore(), tmp_path)
    for name in ("_moved_at", "_heard_at", "_looked_at"):
        setattr(rank, name, time.monotonic() - 3600)
    rank._look()
    assert rank.report is None


def test_progress_at_the_last_moment_keeps_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rank = Rank(0, 1, HashStore(), tmp_path)
    rank._publish("runs")
    rank._any_progress()
    monkeypatch.setattr(watchdog.time, "sleep", lambda seconds: rank.pulse.tick("late"))
    rank._give_up()
    assert rank.report is None
