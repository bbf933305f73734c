"""Training progress: a progress bar in a terminal, plain lines elsewhere."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
import torch
from rich.console import Console

from dist_ft.process.place import Place, Worker
from dist_ft.track.compose import NullTracker, Trackers
from dist_ft.track.progress import Bar, Lines, open_log_of_progress, open_progress

TRAINING = {
    "train/loss": 1.23456,
    "train/learning_rate": 2e-4,
    "perf/tokens_per_second": 12345.6,
    "perf/step_time_s": 30.0,
    "perf/peak_memory_bytes": 1.5 * 2**30,
}


def test_plain_lines_without_control_characters() -> None:
    file = io.StringIO()
    tracker = open_progress(10, after_step=4, file=file)
    assert isinstance(tracker, Lines)
    tracker.log({"eval/loss": 2.0, "eval/exact_match": 0.25}, step=4)
    tracker.log(TRAINING, step=5)
    tracker.close()
    first, second = file.getvalue().splitlines()
    assert first == "step 4/10  eval/loss 2.0000  eval/exact_match 0.2500"
    assert re.fullmatch(r"step 5/10  loss 1\.2346  12,346 tokens/s  lr 2\.00e-04  1\.50 GiB  eta 0:02:30", second)
    assert file.getvalue().replace("\n", "").isprintable()


def test_a_terminal_gets_a_bar() -> None:
    class Terminal(io.StringIO):
        def isatty(self) -> bool:
            return True

    tracker = open_progress(10, after_step=0, file=Terminal())
    assert isinstance(tracker, Bar)
    tracker.close()


def test_the_bar_shows_step_numbers_and_evaluations() -> None:
    file = io.StringIO()
    tracker = Bar(10, after_step=4, console=Console(file=file, force_terminal=True, width=140))
    tracker.log({"eval/loss": 2.0}, step=4)
    tracker.log(TRAINING, step=5)
    tracker.close()
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    assert "step 4  eval/loss 2.0000" in shown
    assert "5/10" in shown and "loss 1.2346  12,346 tokens/s  lr 2.00e-04  1.50 GiB" in shown


@pytest.mark.parametrize(("width", "shown"), [(60, "loss 1.2346"), (80, "loss 1.2346  12,346 tokens/s")])
def test_steps_and_remaining_time_fit_any_width(width: int, shown: str) -> None:
    """A narrow terminal loses the less important numbers, and no line is wider than it."""
    file = io.StringIO()
    tracker = Bar(20_000, after_step=0, console=Console(file=file, force_terminal=True, width=width))
    tracker.log(TRAINING, step=19_998)
    tracker.log(TRAINING, step=19_999)
    tracker.close()
    text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.getvalue())
    lines = [line for line in re.split(r"[\r\n]+", text) if "19999/20000" in line]
    assert lines and all(len(line) <= width for line in lines)
    assert re.search(rf"19999/20000 eta \d?-?:[-\d]\d?-?:[-\d]\d?-? +{re.escape(shown)} *$", lines[-1]), lines[-1]


def test_the_bar_ends_with_the_last_step_and_is_not_drawn_again() -> None:
    file = io.StringIO()
    tracker = Bar(10, after_step=8, console=Console(file=file, force_terminal=True, width=80))
    tracker.log(TRAINING, step=10)
    print("trained 10 steps", file=file)
    length = len(file.getvalue())
    tracker.log({"eval/loss": 1.0}, step=10)
    tracker.close()
    after = file.getvalue()[length:]
    assert after.strip() == "step 10  eval/loss 1.0000", "nothing but the evaluation follows"


def test_lines_of_a_worker_stand_above_the_bar() -> None:
    """What a terminal shows in the end: no line has both the words and a part of the bar."""
    file = io.StringIO()
    worker = Worker(Place(), torch.device("cpu"), file, lambda phase: None)
    worker.say("before")
    tracker = Bar(10, after_step=0, console=Console(file=file, force_terminal=True, width=80), above=worker.above)
    tracker.log(TRAINING, step=1)
    worker.say("a checkpoint [saved]")
    tracker.log(TRAINING, step=2)
    tracker.log(TRAINING, step=10)
    worker.say("after")
    tracker.close()
    shown: list[str] = []
    for line in file.getvalue().split("\n"):
        whole = line.split("\r")[-1].split("\x1b[2K")[-1]  # what was erased is not there
        shown.append(re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", whole))
    assert [line.rstrip() for line in shown if "dist-ft" in line] == [
        "dist-ft: before",
        "dist-ft: a checkpoint [saved]",
        "dist-ft: after",
    ]


def test_progress_stands_in_a_file_of_its_own(tmp_path: Path) -> None:
    for step in (1, 2):  # a start and its resumption
        tracker = open_log_of_progress(10, tmp_path / "logs")
        tracker.log(TRAINING, step=step)
        tracker.close()
    lines = (tmp_path / "logs" / "progress.log").read_text().splitlines()
    assert [line[:9] for line in lines] == ["step 1/10", "step 2/10"] and "eta 0:04:" in lines[0]


def test_all_trackers_are_closed_though_one_fails() -> None:
    told: list[str] = []

    class Broken(NullTracker):
        def close(self, error: BaseException | None = None) -> None:
            told.append("broken")
            raise OSError("disk full")

    class Sound(NullTracker):
        def log(self, metrics: object, *, step: int) -> None:
            told.append(f"log {step}")

        def close(self, error: BaseException | None = None) -> None:
            told.append("sound")

    trackers = Trackers([Sound(), Broken()])
    trackers.log({}, step=3)
    try:
        trackers.close()
    except OSError as error:
        assert str(error) == "disk full"
    assert told == ["log 3", "broken", "sound"]
