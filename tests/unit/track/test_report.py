"""The report is written beside the training: not too often, never twice at once, and no error of it ends a run."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path

import pytest

from dist_ft.config.track import TrackConfig
from dist_ft.track.compose import NullTracker
from dist_ft.track.report import ReportTracker, open_report, write_last


def starts(run: Path) -> int:
    return len((run / "starts").read_text()) if (run / "starts").exists() else 0


def wait_for(run: Path, count: int) -> None:
    deadline = time.monotonic() + 30
    while starts(run) < count:
        assert time.monotonic() < deadline
        time.sleep(0.02)


def command(body: str) -> list[str]:
    code = f"import sys, time; run = sys.argv[-1]; open(run + '/starts', 'a').write('x'); {body}"
    return [sys.executable, "-c", code]


def test_it_is_started_when_due_and_not_twice_at_once(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    tracker = ReportTracker(tmp_path, command("time.sleep(60)"), interval_s=0.3)
    tracker.log({}, step=1)
    assert starts(tmp_path) == 0, "it is not due yet"
    time.sleep(0.4)
    tracker.log({}, step=2)
    wait_for(tmp_path, 1)
    time.sleep(0.4)
    tracker.log({}, step=3)
    time.sleep(0.2)
    assert starts(tmp_path) == 1, "it is still being written"
    begun = time.monotonic()
    tracker.close()
    assert time.monotonic() - begun < 5, "the end of the run does not wait for it"


def test_it_is_started_again_after_it_has_ended(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    tracker = ReportTracker(tmp_path, command("pass"), interval_s=0.0)
    for count in (1, 2, 3):
        deadline = time.monotonic() + 30
        while starts(tmp_path) < count:
            tracker.log({}, step=count)
            assert time.monotonic() < deadline
            time.sleep(0.05)
    tracker.close()


def test_a_large_file_makes_it_rarer(tmp_path: Path) -> None:
    with (tmp_path / "metrics.jsonl").open("wb") as file:
        file.truncate(100 * 2**20)
    tracker = ReportTracker(tmp_path, command("pass"), interval_s=0.0)
    tracker.log({}, step=1)
    assert 95 < tracker._due_at - time.monotonic() <= 100
    tracker.close()


def test_a_command_that_cannot_start_is_told_once(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    tracker = ReportTracker(tmp_path, [str(tmp_path / "none")], interval_s=0.0)
    tracker.log({}, step=1)
    tracker.log({}, step=2)
    tracker.close()
    assert capfd.readouterr().out.count("the report is not written while the run trains") == 1
    assert tracker._due_at == math.inf


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("pass", None),
        ("sys.exit('disk full')", "disk full"),
        ("sys.exit(3)", "exit code 3"),
        ("time.sleep(60)", "it took longer than 1 s"),
    ],
)
def test_the_last_report_is_waited_for(body: str, reason: str | None, tmp_path: Path) -> None:
    found = write_last(tmp_path, command(body), limit_s=1 if "60" in body else 60)
    assert found is None if reason is None else str(found).startswith(reason)
    assert starts(tmp_path) == 1
    assert write_last(tmp_path, [str(tmp_path / "none")]) is not None


def test_track_report_turns_it_off(tmp_path: Path) -> None:
    assert isinstance(open_report(TrackConfig(report=False), tmp_path), NullTracker)
    assert isinstance(open_report(TrackConfig(), tmp_path), ReportTracker)
