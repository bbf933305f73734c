"""Training progress on rank 0: a progress bar in a terminal, or one line per logged step elsewhere."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from ..protocols import Tracker
from ..state import Metrics


def open_progress(total_steps: int, *, after_step: int, file: TextIO) -> Tracker:
    """Build a progress bar if `file` is a terminal, and a tracker that prints plain lines otherwise.

    Args:
        total_steps: Total number of steps of the run.
        after_step: Step that the run resumes from; 0 for a new run.
        file: Text stream to write to.
    """
    if file.isatty():
        return Bar(total_steps, after_step=after_step, console=Console(file=file))
    return Lines(total_steps, file=file)


class Bar:
    """Tracker with a rich progress bar and the metrics of the last logged step; evaluations are printed above it."""

    def __init__(self, total_steps: int, *, after_step: int, console: Console) -> None:
        self._progress = Progress(
            TextColumn("train"),
            BarColumn(bar_width=None),
            MofNCompleteColumn(),
            TextColumn("eta"),
            TimeRemainingColumn(elapsed_when_finished=True),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,  # stdout and stderr of the worker go to its log file
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=after_step, numbers="")
        self._progress.start()

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Advance the bar, or print an evaluation above it."""
        if evaluation := format_evaluation(metrics):
            self._progress.console.print(f"step {step}  {evaluation}", markup=False, highlight=False)
        if numbers := "  ".join(format_training(metrics)):
            self._progress.update(self._task, completed=step, numbers=numbers)

    def close(self) -> None:
        """Stop updating the bar and leave it on the screen."""
        self._progress.stop()


class Lines:
    """Tracker that prints one line of plain text per logged step, without control characters."""

    def __init__(self, total_steps: int, *, file: TextIO) -> None:
        self._total_steps = total_steps
        self._step_times_s: list[float] = []
        self._file = file

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Print a line."""
        words = [format_evaluation(metrics), *format_training(metrics)]
        if "perf/step_time_s" in metrics:
            self._step_times_s.append(metrics["perf/step_time_s"])
            left_s = statistics.fmean(self._step_times_s) * (self._total_steps - step)
            words.append(f"eta {datetime.timedelta(seconds=round(left_s))}")
        print(f"step {step}/{self._total_steps}", *filter(None, words), sep="  ", file=self._file, flush=True)

    def close(self) -> None:
        """Do nothing; the caller closes the file."""


def format_training(metrics: Metrics) -> Iterator[str]:
    """Format those of loss, learning rate, tokens/s and peak memory that are in the metrics of a training step."""
    for name, text in (
        ("train/loss", "loss {:.4f}"),
        ("train/learning_rate", "lr {:.2e}"),
        ("perf/tokens_per_second", "{:,.0f} tokens/s"),
    ):
        if name in metrics:
            yield text.format(metrics[name])
    if "perf/peak_memory_bytes" in metrics:
        yield f"{metrics['perf/peak_memory_bytes'] / 2**30:.2f} GiB"


def format_evaluation(metrics: Metrics) -> str:
    """Format the evaluation metrics; the result is empty if there are none."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval/"))
