"""Run the trials of a search, several at a time if wanted, and stop those that are worse than the others."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from ...config.plan import LOCK_FILE, METRICS_FILE
from ...config.run import RunConfig
from ...errors import MachineError, RequestError, Stopped
from ...process.owner import command_owns
from ...process.stop import AGAIN, SIGNALS
from ...track.jsonl import read_evaluations, read_metrics
from ..composition.compose import list_groups
from ..composition.words import override_words
from ..machine.devices import choose_for_slots
from ..process import Signals, handled
from .space import Search
from .summary import show, write_summary
from .trial import Outcome, trial_name

if TYPE_CHECKING:
    from .study import Started, Study  # Optuna need not be installed to check a search

STUDY_FILE = "study.journal"
CHECKED = "checked"  # folder of a run that is only checked, below that of the search
# Codes that end the search: invalid request or environment, stopped on request, ended by a signal.
HOPELESS = (2, 3, Stopped.exit_code, *(128 + number for number in SIGNALS))
POLL_S = 0.1
LOOK_S = 2.0  # between two looks into the metrics of a trial


class Process(Protocol):
    """A trial that runs, as `subprocess.Popen`."""

    def poll(self) -> int | None:
        """Return the exit code, or None while it runs; -N if it was ended by signal N."""

    def send_signal(self, number: int, /) -> None:
        """Send a signal."""


Check = Callable[[Sequence[str]], RunConfig]
# Starts `dist-ft train` with arguments, environment variables, and a file for its output, or None for the terminal.
Start = Callable[[Sequence[str], Mapping[str, str], Path | None], Process]


@dataclass
class Running:
    """A trial that runs: its values, process, folder, and the slot of devices that it has."""

    started: Started
    process: Process
    folder: Path
    slot: int
    began: float = field(default_factory=time.monotonic)
    looked: float = 0.0
    last_score: float | None = None
    pruned_at: int | None = None  # step


def sweep(
    search: Search,
    compose: Check,
    check: Check,
    start: Start,
    devices: Sequence[int | str] = (),
    *,
    poll_s: float = POLL_S,
    look_s: float = LOOK_S,
) -> int:
    """Run the trials and print their scores; a search that was interrupted goes on.

    Args:
        search: Search to run.
        compose: Composes arguments into a configuration.
        check: Does the same, and raises RequestError if a run cannot be started with them.
        start: Starts `dist-ft train`.
        devices: GPUs of this machine, which trials that run at the same time share out.
        poll_s: Seconds between two looks at the processes.
        look_s: Seconds between two looks at the metrics of a trial, by which it may be pruned.

    Returns:
        0 if at least one trial succeeded and the search was not stopped, else the exit code of the last trial.

    Raises:
        RequestError: If a value of the search space is invalid, there is no validation data, the folder has something
            else, or the runs do not have the metric.
        MachineError: If Optuna is not installed.
    """
    config = check_values(search, compose, check)
    if search.options.jobs > 1 and config.launch.name != "local":
        way_out = "set launch=local, or jobs=1"
        raise RequestError.of(f"jobs={search.options.jobs}", f"launch={config.launch.name} runs one at a time", way_out)
    slots = choose_for_slots(devices, search.options.jobs)
    folder = Path(config.output_dir)
    if folder.exists() and not (folder / STUDY_FILE).exists() and any(p.name != LOCK_FILE for p in folder.iterdir()):
        way_out = "set another run_name or output_dir"
        raise RequestError.of(f"output_dir={folder}", "already exists, and is not that of a search", way_out)
    study_of = _find_optuna()
    signals = Signals()
    with command_owns(folder), handled(signals):
        study = study_of(search, folder / STUDY_FILE, config.train.seed)
        trials = Trials(search, config, study, start, slots)
        with trials.ended_on_error():
            while trials.go_on(signals):
                time.sleep(poll_s)
                trials.look(look_s)
    show(folder, search, study.trials)
    if trials.hopeless is not None or (signals.first is not None and trials.left):
        return Stopped.exit_code if trials.hopeless is None else trials.hopeless
    scored = any(trial.outcome.state == "complete" for trial in study.trials)
    return 0 if scored else study.trials[-1].outcome.exit_code


class Trials:
    """The trials of a search that run now, one in each slot.

    Args:
        search: The search.
        config: Configuration of a trial.
        study: Chooses values and keeps results.
        start: Starts `dist-ft train`.
        slots: Environment variables of the trial in each slot.
    """

    def __init__(
        self, search: Search, config: RunConfig, study: Study, start: Start, slots: Sequence[Mapping[str, str]]
    ) -> None:
        self._search, self._config, self._study, self._start, self._slots = search, config, study, start, slots
        self._folder = Path(config.output_dir)
        self._running: list[Running] = []
        self._asked: list[bool] = []  # of each signal that was passed on, whether it was the second
        self._exhausted = False
        self.hopeless: int | None = None

    @property
    def left(self) -> bool:
        """Whether there are trials to run, as far as is known."""
        return not self._exhausted and (
            self._search.options.sampler == "grid" or len(self._study.trials) < self._search.options.trials
        )

    def go_on(self, signals: Signals) -> bool:
        """Start trials in free slots, or pass a signal on; return whether trials run."""
        if signals.first is not None and signals.again not in self._asked:
            self._asked.append(signals.again)
            if self._running and not signals.again:
                print(f"dist-ft: {signals.name}: stopping the trials that run; {AGAIN}", flush=True)
            self._send(signals.first)
        while self.hopeless is None and signals.first is None and self._has_place():
            started = self._study.begin()
            if started is None:
                self._exhausted = True
                break
            self._run(started)
        return bool(self._running)

    def look(self, every_s: float) -> None:
        """Record the trials that have ended, and prune those that are worse than the others."""
        for trial in list(self._running):
            code = trial.process.poll()
            if code is not None:
                self._running.remove(trial)
                self._record(trial, code if code >= 0 else 128 - code)
            elif time.monotonic() - trial.looked >= every_s:
                trial.looked = time.monotonic()
                self._report(trial)

    @contextlib.contextmanager
    def ended_on_error(self) -> Iterator[None]:
        """Stop the trials that run and wait for them if the body raises an error."""
        try:
            yield
        except BaseException:
            self._send(signal.SIGTERM)
            while any(trial.process.poll() is None for trial in self._running):
                time.sleep(POLL_S)
            raise

    def _has_place(self) -> bool:
        counted = len(self._study.trials) + len(self._running)
        wanted = self._search.options.sampler == "grid" or counted < self._search.options.trials
        return wanted and not self._exhausted and len(self._running) < len(self._slots)

    def _run(self, started: Started) -> None:
        name = trial_name(started.number)
        folder = self._folder / name
        chosen = [f"{key}={value}" for key, value in started.values.items()]
        print(f"dist-ft: {name}: {' '.join(chosen)}", flush=True)
        own = [f"run_name={self._config.run_name}-{name}", f"output_dir='{folder}'"]
        if self._config.track.uses_wandb:
            own.append(f"track.group={self._config.run_name}")
        words = override_words(self._search.fixed, [*chosen, *own], list_groups())
        slot = min(set(range(len(self._slots))) - {trial.slot for trial in self._running})
        output = self._folder / f"{name}.log" if len(self._slots) > 1 else None
        self._running.append(Running(started, self._start(words, self._slots[slot], output), folder, slot))

    def _report(self, trial: Running) -> None:
        """Report new evaluations to the study, and stop the trial if the newest is worse than those of the others."""
        name = f"eval/{self._search.metric}"
        lines = read_metrics(trial.folder / METRICS_FILE) if trial.pruned_at is None else ()
        worse = False
        for line in lines:
            score = line.get(name)
            if score is not None and line["step"] > 0 and line["step"] not in trial.started.reported:
                trial.last_score = score
                worse = trial.started.report(line["step"], score)
                trial.pruned_at = line["step"] if worse else None
        if worse:
            shown = trial_name(trial.started.number)
            print(f"dist-ft: {shown}: pruned at step {trial.pruned_at}, {name} {trial.last_score:.4g}", flush=True)
            _signal(trial, signal.SIGTERM)

    def _record(self, trial: Running, code: int) -> None:
        seconds = time.monotonic() - trial.began
        name = trial_name(trial.started.number)
        stopped_by_us = trial.pruned_at is not None and code in (Stopped.exit_code, 128 + signal.SIGTERM)
        if stopped_by_us:
            outcome = Outcome("pruned", trial.last_score, code, seconds)
        elif code in HOPELESS:  # it goes on when the search is started again
            if self.hopeless is None:
                self.hopeless = code
                self._send(signal.SIGTERM)
            return
        else:
            score = last_score(trial.folder, self._search.metric) if code == 0 else None
            outcome = Outcome("failed" if score is None else "complete", score, code, seconds)
        self._study.finish(trial.started, outcome)
        write_summary(self._folder, self._search, self._study.trials)
        if len(self._slots) > 1:
            shown = outcome.state if outcome.score is None else f"eval/{self._search.metric} {outcome.score:.4g}"
            print(f"dist-ft: {name}: {shown}, exit {code}, {seconds:.0f} s", flush=True)

    def _send(self, number: int) -> None:
        for trial in self._running:
            _signal(trial, number)


def _signal(trial: Running, number: int) -> None:
    with contextlib.suppress(ProcessLookupError):
        trial.process.send_signal(number)


def check_values(search: Search, compose: Check, check: Check) -> RunConfig:
    """Check each value of the search space together with the first values of the other keys.

    Raises:
        RequestError: If one is invalid, or there is no validation data.
    """
    first = {axis.key: f"{axis.key}={axis.samples[0]}" for axis in search.axes}
    config = compose([*search.fixed, *first.values()])
    # The folder of the search may exist already; it is not that of a run.
    fixed = override_words(search.fixed, [f"output_dir='{Path(config.output_dir) / CHECKED}'"], list_groups())
    check([*fixed, *first.values()])
    for axis in search.axes:
        for value in axis.samples[1:]:
            check([*fixed, *{**first, axis.key: f"{axis.key}={value}"}.values()])
    if not config.data.has("validation"):
        raise RequestError.of("data.validation", "is required to compare trials", "set data.validation")
    return config


def _find_optuna() -> type[Study]:
    try:
        from .study import Study
    except ImportError as error:
        way_out = "run `pip install 'dist-ft[sweep]'`"
        raise MachineError.of("optuna", "version 4 or later is not installed", way_out) from error
    return Study


def last_score(folder: Path, metric: str) -> float | None:
    """Return the metric of the last evaluation of a run, which is that of the exported model; None if it is not finite.

    Raises:
        RequestError: If the evaluation does not have this metric.
    """
    _, last = read_evaluations(folder / METRICS_FILE)
    if f"eval/{metric}" not in last:
        known = ", ".join(name.removeprefix("eval/") for name in last if name != "step")
        raise RequestError.of(f"metric={metric}", "is not a metric of the evaluation", f"set one of {known}")
    return last[f"eval/{metric}"]
