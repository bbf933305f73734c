"""The results of a search: a CSV file and a table, the best trial first."""

from __future__ import annotations

import csv
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from .space import Search
from .trial import Trial, trial_name

SUMMARY = "sweep.csv"


def ranked(search: Search, trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials from best to worst, followed by those that were pruned and those that failed."""
    sign = 1 if search.lower_is_better else -1
    order = ["complete", "pruned", "failed"]

    def place(trial: Trial) -> tuple[int, float, int]:
        score = trial.outcome.score
        return order.index(trial.outcome.state), 0.0 if score is None else sign * score, trial.number

    return sorted(trials, key=place)


def write_summary(folder: Path, search: Search, trials: Sequence[Trial]) -> None:
    """Write the trials so far to `sweep.csv`; the score of a pruned trial is its last one."""
    staging = folder / f".{SUMMARY}.new"
    with staging.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["trial", *search.keys, f"eval/{search.metric}", "state", "exit_code", "seconds", "folder"])
        for trial in ranked(search, trials):
            how = trial.outcome
            score = "" if how.score is None else how.score
            where = folder / trial_name(trial.number)
            lines.writerow(
                [trial.number, *trial.values.values(), score, how.state, how.exit_code, f"{how.seconds:.1f}", where]
            )
    staging.replace(folder / SUMMARY)


def show(folder: Path, search: Search, trials: Sequence[Trial]) -> None:
    """Print a table of the trials, and where the model of the best one is."""
    table = Table("trial", *search.keys, f"eval/{search.metric}", "state", "seconds", title=os.path.relpath(folder))
    best_first = ranked(search, trials)
    for trial in best_first:
        how = trial.outcome
        score = "" if how.score is None else f"{how.score:.4g}"
        state = f"exit {how.exit_code}" if how.state == "failed" and how.exit_code else how.state
        values = [_short(value) for value in trial.values.values()]
        table.add_row(trial_name(trial.number), *values, score, state, f"{how.seconds:.0f}")
    Console().print(table)
    print(f"dist-ft: {len(trials)} trials in {folder / SUMMARY}")
    if best_first and best_first[0].outcome.state == "complete":
        best = best_first[0]
        where = os.path.relpath(folder / trial_name(best.number))
        chosen = shlex.join(f"{key}={value}" for key, value in best.values.items())
        print(f"dist-ft: best: {chosen}; next: dist-ft eval {shlex.quote(f'run={where}')}", flush=True)


def _short(value: str) -> str:
    """Format a number with four significant digits; return any other text unchanged."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value
