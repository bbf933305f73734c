"""Training progress on rank 0: a progress bar in a terminal, or one line per logged step elsewhere."""

from __future__ import annotations

import datetime
import statistics
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Column

from ..process.place import Above
from ..protocols import Tracker
from ..state import Metrics

PROGRESS_LOG = "progress.log"  # in the folder of logs
ETA_WIDTH = 9  # 123:45:06
LEAST_BAR = 8  # characters


def open_progress(total_steps: int, *, after_step: int, file: TextIO, above: Above | None = None) -> Tracker:
    """Build a progress bar if `file` is a terminal, and a tracker that prints plain lines otherwise.

    Args:
        total_steps: Total number of steps of the run.
        after_step: Step that the run resumes from; 0 for a new run.
        file: Text stream to write to.
        above: Told to show lines above the bar while there is one.
    """
    if file.isatty():
        return Bar(total_steps, after_step=after_step, console=Console(file=file), above=above)
    return Lines(total_steps, file=file)


def open_log_of_progress(total_steps: int, folder: Path) -> Tracker:
    """Build a tracker that appends a plain line per logged step to progress.log in the folder of logs."""
    folder.mkdir(parents=True, exist_ok=True)
    return Lines(total_steps, file=(folder / PROGRESS_LOG).open("a", encoding="utf-8"), owns_file=True)


class Bar:
    """Tracker with a rich progress bar and the metrics of the last logged step; evaluations are printed above it.

    Steps and remaining time are always shown. Of the metrics, those that fit are shown, the most important first. The
    bar ends with the last step, so that what is printed afterwards stands below it.
    """

    def __init__(self, total_steps: int, *, after_step: int, console: Console, above: Above | None = None) -> None:
        self._total_steps = total_steps
        self._above = above or Above()
        whole = Column(no_wrap=True)
        self._progress = Progress(
            TextColumn("train", table_column=whole),
            BarColumn(bar_width=None, table_column=Column(ratio=1)),
            MofNCompleteColumn(table_column=whole),
            TextColumn("eta", table_column=whole),
            TimeRemainingColumn(elapsed_when_finished=True, table_column=whole),
            TextColumn("{task.fields[numbers]}", table_column=whole),
            expand=True,
            console=console,
            refresh_per_second=4,
            redirect_stdout=False,  # stdout and stderr of the worker go to its log file
            redirect_stderr=False,
        )
        self._task = self._progress.add_task("train", total=total_steps, completed=after_step, numbers="")
        self._progress.start()
        self._above.show = self._show

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Advance the bar, or print an evaluation above it."""
        if evaluation := format_evaluation(metrics):
            self._show(f"step {step}  {evaluation}")
        if numbers := list(format_training(metrics)):
            self._progress.update(self._task, completed=step, numbers=self._fitting(numbers))
        if step == self._total_steps and numbers:
            self.close()

    def _show(self, line: str) -> None:
        self._progress.console.print(line, markup=False, highlight=False)

    def _fitting(self, numbers: list[str]) -> str:
        """Return as many of the numbers, in their order, as fit beside the bar."""
        steps = 2 * len(str(self._total_steps)) + 1
        room = self._progress.console.width - len("train") - LEAST_BAR - steps - len("eta") - ETA_WIDTH - 5
        while numbers and len("  ".join(numbers)) > room:
            numbers = numbers[:-1]
        return "  ".join(numbers)

    def close(self, error: BaseException | None = None) -> None:
        """Stop updating the bar and leave it on the screen."""
        self._above.show = None
        self._progress.stop()


class Lines:
    """Tracker that prints one line of plain text per logged step, without control characters."""

    def __init__(self, total_steps: int, *, file: TextIO, owns_file: bool = False) -> None:
        self._total_steps = total_steps
        self._owns_file = owns_file
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

    def close(self, error: BaseException | None = None) -> None:
        """Close the file, if it belongs to this tracker."""
        if self._owns_file:
            self._file.close()


def format_training(metrics: Metrics) -> Iterator[str]:
    """Format those of loss, tokens/s, learning rate and peak memory that a training step has, the important first."""
    for name, text in (
        ("train/loss", "loss {:.4f}"),
        ("perf/tokens_per_second", "{:,.0f} tokens/s"),
        ("train/learning_rate", "lr {:.2e}"),
    ):
        if name in metrics:
            yield text.format(metrics[name])
    if "perf/peak_memory_bytes" in metrics:
        yield f"{metrics['perf/peak_memory_bytes'] / 2**30:.2f} GiB"


def format_evaluation(metrics: Metrics) -> str:
    """Format the evaluation metrics; the result is empty if there are none."""
    return "  ".join(f"{name} {value:.4f}" for name, value in metrics.items() if name.startswith("eval/"))
