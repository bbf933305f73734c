"""The trials of a search and what is tried next: an Optuna study, kept in the folder of the search.

It is a file of Optuna's journal storage, which needs no database and works on network file systems; `optuna-dashboard`
shows it. A search that is started again goes on with it. Trials that were interrupted are run again in their folder,
where `dist-ft train` resumes from the last checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from ...errors import RequestError
from ..composition.file import is_file
from .space import Axis, Search
from .trial import Outcome, State, Trial

STATES: Mapping[TrialState, State] = {
    TrialState.COMPLETE: "complete",
    TrialState.PRUNED: "pruned",
    TrialState.FAIL: "failed",
}
# What Optuna keeps with a trial. The number is that of the folder: Optuna counts every start of a trial.
NUMBER, EXIT_CODE, SECONDS = "number", "exit_code", "seconds"


@dataclass
class Started:
    """A trial that runs: its number and the chosen values by key."""

    number: int
    values: dict[str, str]
    of_optuna: optuna.Trial
    reported: set[int] = field(default_factory=set)  # steps

    def report(self, step: int, score: float) -> bool:
        """Report the score of a step that was not reported yet; return whether the trial should be pruned."""
        self.reported.add(step)
        self.of_optuna.report(score, step)
        return self.of_optuna.should_prune()


class Study:
    """The study of a search.

    Args:
        search: The search.
        file: File of the study, whose folder exists.
        seed: Seed of the sampler.

    Raises:
        RequestError: If the file has a study of other arguments, or cannot be read.
    """

    def __init__(self, search: Search, file: Path, seed: int) -> None:
        self._search = search
        self._distributions = {axis.key: distribution(axis) for axis in search.axes}
        optuna.logging.set_verbosity(optuna.logging.ERROR)  # each trial is printed when it starts
        pruners = {"median": optuna.pruners.MedianPruner, "none": optuna.pruners.NopPruner}
        _cut_torn_line(file)
        try:
            self._study = optuna.create_study(
                storage=JournalStorage(JournalFileBackend(str(file))),
                study_name=file.parent.name,
                direction="minimize" if search.lower_is_better else "maximize",
                load_if_exists=True,
                pruner=pruners[search.options.pruner](),
            )
        except (ValueError, KeyError) as error:
            raise RequestError.of(str(file), f"cannot be read ({error})", "set another run_name") from error
        before = self._study.get_trials(deepcopy=False)
        # A search that goes on must not draw the values of its first trials again.
        self._seed = (seed + len(before)) % 2**32
        self._study.sampler = _sampler(search, self._seed)
        self._compare()
        self._take_up(before)

    @property
    def trials(self) -> list[Trial]:
        """The trials that have ended, in the order of their numbers."""
        known = self._study.get_trials(deepcopy=False)
        ended = {trial.user_attrs[NUMBER]: self._ended(trial) for trial in known if EXIT_CODE in trial.user_attrs}
        return [ended[number] for number in sorted(ended)]

    def begin(self) -> Started | None:
        """Choose the values of the next trial, which no other trial has; None if all combinations were tried."""
        untried = self._untried()
        waiting = any(trial.state == TrialState.WAITING for trial in self._study.get_trials(deepcopy=False))
        if not waiting and untried is not None:
            if not untried:
                return None
            if self._search.options.sampler == "grid":
                self._study.enqueue_trial(self._parameters(untried[0]))
        trial = self._study.ask(self._distributions)
        if NUMBER not in trial.user_attrs and untried is not None and self._values(trial.params) not in untried:
            self._study.tell(trial, state=TrialState.FAIL)  # it would give the same run again
            chosen = random.Random(self._seed + trial.number).choice(untried)  # noqa: S311 – no secret
            self._study.enqueue_trial(self._parameters(chosen))
            trial = self._study.ask(self._distributions)
        if NUMBER not in trial.user_attrs:
            taken = [other.user_attrs.get(NUMBER, -1) for other in self._study.get_trials(deepcopy=False)]
            trial.set_user_attr(NUMBER, max(taken) + 1)
        values = dict(zip(self._search.keys, self._values(trial.params), strict=True))
        return Started(trial.user_attrs[NUMBER], values, trial)

    def finish(self, started: Started, outcome: Outcome) -> None:
        """Record how a trial ended."""
        started.of_optuna.set_user_attr(SECONDS, outcome.seconds)
        started.of_optuna.set_user_attr(EXIT_CODE, outcome.exit_code)
        state = next(state for state, name in STATES.items() if name == outcome.state)
        self._study.tell(started.of_optuna, outcome.score if state == TrialState.COMPLETE else None, state)

    def _compare(self) -> None:
        """Record the arguments of the search, or compare them with those of the first start."""
        own = {
            "arguments": sorted(map(_fingerprint, self._search.fixed)),
            "values": sorted(axis.word for axis in self._search.axes),
            "metric": self._search.metric,
            "sampler": self._search.options.sampler,
        }
        for name, value in own.items():
            known = self._study.user_attrs.get(name)
            if known is None:
                self._study.set_user_attr(name, value)
            elif known != value:
                rule = f"the search in this folder was started with {_listed(known)}, and not {_listed(value)}"
                raise RequestError.of(name, rule, "give the same arguments to go on with it, or set another run_name")

    def _take_up(self, before: Sequence[FrozenTrial]) -> None:
        """Queue the trials that an earlier start left unfinished, each with its number, and so its folder."""
        queued = {trial.user_attrs.get(NUMBER) for trial in before if trial.state == TrialState.WAITING}
        for trial in before:
            if trial.state != TrialState.RUNNING:
                continue
            number = trial.user_attrs.get(NUMBER)
            if number is not None and number not in queued:
                self._study.enqueue_trial(trial.params, user_attrs={NUMBER: number})
            self._study.tell(trial.number, state=TrialState.FAIL)

    def _untried(self) -> list[tuple[str, ...]] | None:
        """Return the combinations that no trial has, in order; None if there are too many to be listed."""
        combinations = self._search.combinations()
        if combinations is None:
            return None
        tried = {
            self._values(trial.params)
            for trial in self._study.get_trials(deepcopy=False)
            if NUMBER in trial.user_attrs and trial.state != TrialState.WAITING
        }
        return [values for values in combinations if values not in tried]

    def _values(self, parameters: Mapping[str, Any]) -> tuple[str, ...]:
        return tuple(written(axis, parameters[axis.key]) for axis in self._search.axes)

    def _parameters(self, values: Sequence[str]) -> dict[str, Any]:
        return {
            axis.key: value if axis.values and not axis.ordered else _number(value)
            for axis, value in zip(self._search.axes, values, strict=True)
        }

    def _ended(self, trial: FrozenTrial) -> Trial:
        values = dict(zip(self._search.keys, self._values(trial.params), strict=True))
        attributes = trial.user_attrs
        outcome = Outcome(
            STATES.get(trial.state, "failed"), trial.value, attributes[EXIT_CODE], attributes.get(SECONDS, 0.0)
        )
        return Trial(attributes[NUMBER], values, outcome)


def distribution(axis: Axis) -> BaseDistribution:
    """Return the distribution of an axis: categorical, unless the values are ordered."""
    if not axis.values:
        whole = isinstance(axis.low, int)
        kind = IntDistribution if whole else FloatDistribution
        return kind(axis.low, axis.high, log=axis.log)  # type: ignore[arg-type]
    if not axis.ordered:
        return CategoricalDistribution(axis.values)
    numbers = [_number(value) for value in axis.values]
    if all(isinstance(number, int) for number in numbers):
        return IntDistribution(int(numbers[0]), int(numbers[-1]), step=int(numbers[1] - numbers[0]))
    return FloatDistribution(numbers[0], numbers[-1], step=numbers[1] - numbers[0])


def written(axis: Axis, value: Any) -> str:
    """Return a value that Optuna chose as it is written after `=`; those of a range lose errors of rounding."""
    if axis.ordered:
        return min(axis.values, key=lambda known: abs(float(known) - value))
    return str(value)


def _number(text: str) -> float:
    try:
        return int(text)
    except ValueError:
        return float(text)


def _sampler(search: Search, seed: int) -> optuna.samplers.BaseSampler:
    kind = search.options.sampler
    if kind == "cmaes":
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False)
    if kind != "tpe":  # of a grid, begin() chooses
        return optuna.samplers.RandomSampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # constant_liar is experimental in Optuna 4
        return optuna.samplers.TPESampler(seed=seed, constant_liar=search.options.jobs > 1)


def _fingerprint(word: str) -> str:
    """Return an argument as it is; of a file, also what stands in it."""
    if not is_file(word):
        return word
    return f"{word} ({hashlib.sha256(Path(word).read_bytes()).hexdigest()[:16]})"


def _listed(value: str | Sequence[str]) -> str:
    return value if isinstance(value, str) else " ".join(value) or "none"


def _cut_torn_line(file: Path) -> None:
    """Remove a last line that was not written completely, because what is appended to it could not be read."""
    with contextlib.suppress(FileNotFoundError):
        text = file.read_bytes()
        if text and not text.endswith(b"\n"):
            os.truncate(file, text.rfind(b"\n") + 1)
