"""Hyperparameter search with Hydra's multirun and its Optuna sweeper.

Each trial is a separate `dist-ft train` in its own folder. Search spaces use Hydra's syntax: `choice(4, 8)`,
`interval(0.1, 0.9)`, `range(1, 9, 2)`, `tag(log, interval(1e-5, 1e-3))`.
"""

from __future__ import annotations

import csv
import importlib.util
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import IntervalSweep, Override
from rich.console import Console
from rich.table import Table

from ..config.plan import METRICS_FILE
from ..config.run import RunConfig
from ..errors import MachineError, RequestError, Stopped
from ..process.options import SweepOptions, split_words
from ..process.options import read_words as read_options
from ..process.stop import SIGNALS
from ..state import LOWER_IS_BETTER
from ..track.jsonl import read_evaluations
from .composition.compose import list_groups
from .composition.file import is_file
from .composition.words import override_words

SUMMARY = "sweep.csv"
# Codes that end the search: invalid request or environment, stopped on request, ended by a signal.
HOPELESS = (2, 3, Stopped.exit_code, *(128 + number for number in SIGNALS))

Check = Callable[[Sequence[str]], RunConfig]
Train = Callable[[Sequence[str]], int]


@dataclass(frozen=True)
class Trial:
    """One run of a search: its chosen values, score (None after a failure), exit code, duration and folder."""

    number: int
    values: dict[str, str]
    score: float | None
    exit_code: int
    seconds: float
    folder: Path


@dataclass(frozen=True)
class Search:
    """A search: arguments for every run, the search space of each key, and the options of the command."""

    fixed: tuple[str, ...]
    swept: dict[str, Override]
    trials: int = 20
    metric: str = "loss"
    sampler: str = "tpe"

    @property
    def lower_is_better(self) -> bool:
        """Return whether a lower value of the metric is better."""
        return self.metric.partition("/")[0] in LOWER_IS_BETTER


def read_words(words: Sequence[str]) -> Search:
    """Parse the arguments of `dist-ft sweep`.

    Raises:
        RequestError: If an option is invalid, or no key has several values.
    """
    own, rest = split_words(SweepOptions, words)
    options = read_options(SweepOptions, own)
    fixed, swept = [], {}
    for word in rest:
        if is_file(word):
            fixed.append(word)
            continue
        try:
            override = OverridesParser.create().parse_override(word)
        except Exception as error:  # Hydra's parser raises several unrelated types
            raise RequestError.of(
                word, "cannot be parsed", "write KEY=choice(A,B) or KEY=interval(LOW,HIGH)"
            ) from error
        if override.is_sweep_override():
            swept[override.key_or_group] = override
        else:
            fixed.append(word)
    if not swept:
        raise RequestError.of("dist-ft sweep", "no key has several values", "write for example method.r=choice(4,8)")
    metric = options.metric.removeprefix("eval/")
    return Search(tuple(fixed), swept, options.trials, metric, options.sampler)


def sweep(search: Search, check: Check, train: Train) -> int:
    """Run the trials and print their scores.

    Args:
        search: Search to run.
        check: Composes and checks arguments; raises RequestError if they are invalid.
        train: Runs `dist-ft train` with arguments and returns its exit code.

    Returns:
        0 if at least one trial succeeded and the search was not stopped, else the exit code of the last trial.

    Raises:
        RequestError: If a value of the search space is invalid, there is no validation data, or the folder exists.
        MachineError: If the Optuna sweeper is not installed.
    """
    config = _check_all(search, check)
    folder = Path(config.output_dir)
    if folder.exists():
        raise RequestError.of(f"output_dir={folder}", "already exists", "set another run_name or output_dir")
    _require_sweeper()
    trials: list[Trial] = []
    problems: list[RequestError] = []

    def run_trial() -> float:
        number = len(trials)
        chosen = [word.lstrip("+") for word in HydraConfig.get().overrides.task]
        name = f"trial-{number:03d}"
        where = folder / name
        print(f"dist-ft: {name}: {' '.join(chosen)}", flush=True)
        started = time.monotonic()
        own = [f"run_name={config.run_name}-{name}", f"output_dir='{where}'"]
        if config.track.wandb != "off":
            own.append(f"track.group={config.run_name}")
        code = train(override_words(search.fixed, [*chosen, *own], list_groups()))
        values = dict(word.split("=", 1) for word in chosen)
        try:
            score = last_score(where, search.metric) if code == 0 else None
        except RequestError as problem:  # exit, because Hydra would continue with the next trial
            problems.append(problem)
            sys.exit(problem.exit_code)
        trials.append(Trial(number, values, score, code, time.monotonic() - started, where))
        write_summary(folder / SUMMARY, search, trials)
        if code in HOPELESS:
            sys.exit(code)
        if score is None:
            raise RuntimeError(f"trial {number} exited with code {code}")
        return score

    try:
        _multirun(search, folder, config.train.seed, run_trial)
    except SystemExit:  # raised in run_trial, or by Optuna if no trial has a score
        if problems:
            raise problems[0] from None
        if not trials:
            raise
    show(search, trials)
    last = trials[-1].exit_code
    return 0 if last not in HOPELESS and any(trial.score is not None for trial in trials) else last


def last_score(folder: Path, metric: str) -> float:
    """Return the metric of the last evaluation of a run, which is that of the exported model.

    Raises:
        RequestError: If the evaluation does not have this metric.
    """
    _, last = read_evaluations(folder / METRICS_FILE)
    if f"eval/{metric}" not in last:
        known = ", ".join(name.removeprefix("eval/") for name in last if name != "step")
        raise RequestError.of(f"metric={metric}", "is not a metric of the evaluation", f"set one of {known}")
    return last[f"eval/{metric}"]


def ranked(search: Search, trials: Sequence[Trial]) -> list[Trial]:
    """Sort trials from best to worst, followed by those without a score."""
    sign = 1 if search.lower_is_better else -1
    return sorted(trials, key=lambda t: (t.score is None, sign * t.score if t.score is not None else 0.0, t.number))


def write_summary(path: Path, search: Search, trials: Sequence[Trial]) -> None:
    """Write the trials so far to a CSV file, best first."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        lines = csv.writer(file)
        lines.writerow(["trial", *search.swept, f"eval/{search.metric}", "exit_code", "seconds", "folder"])
        for trial in ranked(search, trials):
            values = [trial.values.get(key, "") for key in search.swept]
            score = "" if trial.score is None else trial.score
            lines.writerow([trial.number, *values, score, trial.exit_code, f"{trial.seconds:.1f}", trial.folder])


def show(search: Search, trials: Sequence[Trial]) -> None:
    """Print a table of the trials, best first."""
    table = Table("trial", *search.swept, f"eval/{search.metric}", "seconds", title=str(trials[0].folder.parent))
    for trial in ranked(search, trials):
        values = [_short(trial.values.get(key, "")) for key in search.swept]
        score = f"exit {trial.exit_code}" if trial.score is None else f"{trial.score:.4g}"
        table.add_row(trial.folder.name, *values, score, f"{trial.seconds:.0f}")
    Console().print(table)


def _require_sweeper() -> None:
    try:
        found = importlib.util.find_spec("hydra_plugins.hydra_optuna_sweeper")
    except ModuleNotFoundError:  # there is no plugin of Hydra at all
        found = None
    if found is None:
        raise MachineError.of("hydra-optuna-sweeper", "is not installed", "run `pip install 'dist-ft[sweep]'`")


def _short(value: str) -> str:
    """Format a number with four significant digits; return any other text unchanged."""
    try:
        return f"{float(value):.4g}"
    except ValueError:
        return value


def _check_all(search: Search, check: Check) -> RunConfig:
    """Check each value of the search space together with the first values of the other keys."""
    values = {key: _samples(override) for key, override in search.swept.items()}
    first = {key: f"{key}={found[0]}" for key, found in values.items()}
    config = check([*search.fixed, *first.values()])
    for key, found in values.items():
        for value in found[1:]:
            check([*search.fixed, *{**first, key: f"{key}={value}"}.values()])
    if not config.data.has("validation"):
        raise RequestError.of("data.validation", "is required to compare trials", "set data.validation")
    return config


def _samples(override: Override) -> list[str]:
    """Return all values of a choice or range, or both ends of an interval."""
    value = override.value()
    if isinstance(value, IntervalSweep):
        return [str(value.start), str(value.end)]
    return list(override.sweep_string_iterator())


def _multirun(search: Search, folder: Path, seed: int, run_trial: Callable[[], float]) -> None:
    """Run Hydra's multirun on an empty configuration, to which the sweeper adds the chosen keys."""
    import optuna

    settings = {
        "hydra/sweeper": "optuna",
        "hydra/sweeper/sampler": search.sampler,
        "hydra/job_logging": "none",
        "hydra/hydra_logging": "none",
        "hydra.output_subdir": "null",
        "hydra.sweep.dir": f"'{folder}'",
        "hydra.sweep.subdir": "'.'",
        "hydra.sweeper.direction": "minimize" if search.lower_is_better else "maximize",
        "hydra.sweeper.n_trials": search.trials,
        "hydra.sweeper.n_jobs": 1,
        "hydra.sweeper.max_failure_rate": 1.0,
    }
    if search.sampler != "grid":
        settings["hydra.sweeper.sampler.seed"] = seed % 2**32  # Optuna takes no larger ones
    words = [f"{key}={value}" for key, value in settings.items()]
    swept = [f"+{override.input_line}" for override in search.swept.values()]
    optuna.logging.set_verbosity(optuna.logging.WARNING)  # run_trial prints each trial already
    with patch.object(sys, "argv", ["dist-ft sweep", "--multirun", *words, *swept]):
        hydra.main(version_base="1.3", config_path=None)(lambda _: run_trial())()
