"""Rules about data: sources, mixtures, formats, templates, subsets and augmentation."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from ..config.run import RunConfig
from ..data.read.chosen import has_labels
from ..data.read.fill import template_problems
from ..data.read.formats import FORMATS, detect
from ..data.read.rows import read_rows
from ..data.read.sets import ALONE, key_of, sets_of, sources_of
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem

FIRST_ROWS = 20  # of each file: a wrong encoding, delimiter or format shows at once


def chat_template_problems(config: RunConfig) -> Iterator[Problem]:
    template = getattr(config.task, "chat_template", None)
    if template not in (None, "chatml") and not Path(template).is_file():
        yield Problem("task.chat_template", f"{template}: no such file", "name a Jinja file, or chatml")


def data_problems(config: RunConfig) -> Iterator[Problem]:
    """Sources that name nothing, and files whose first rows cannot be read; preparing reads the rest."""
    for key, source in sources_of(config):
        yield from (replace(problem, where=f"{key}, {problem.where}") for problem in _first_rows_problems(source))


def _first_rows_problems(source: str) -> list[Problem]:
    try:
        for file in resolve(source):
            if not isinstance(file, HubSet):
                collections.deque(itertools.islice(read_rows(str(file)), FIRST_ROWS), maxlen=0)
    except DistFtError as error:
        return list(error.problems)
    return []


def set_problems(config: RunConfig) -> Iterator[Problem]:
    """Sets that are given twice or not at all, formats that the task does not know, templates that cannot be filled."""
    data, mixture = config.data, config.data.mixture
    if mixture is None and not data.train:
        yield Problem("data.train", "must be given", "say data.train=VALUE, or data.mixture={NAME: {train: …}, …}")
        return
    if mixture is not None:
        given = [key for key in ("train", "validation", "test") if getattr(data, key)]
        if given:
            rule = f"data.{given[0]} is given too, and each set of a mixture has its own"
            yield Problem("data.mixture", rule, f"remove data.{given[0]} (data=mixture has none), or data.mixture")
            return
        if not mixture:
            yield Problem("data.mixture", "names no set", "say data.mixture.NAME.train=VALUE for each")
            return
        weighted = [name for name, part in mixture.items() if part.weight is not None]
        if 0 < len(weighted) < len(mixture):
            bare = next(name for name in mixture if name not in weighted)
            rule = f"{bare} has no weight, but {weighted[0]} has one"
            yield Problem("data.mixture", rule, "give all sets a weight, or none")
    for name, alone in sets_of(config).items():
        yield from _format_problems(alone, name)


def _format_problems(alone: RunConfig, name: str) -> Iterator[Problem]:
    data, task = alone.data, alone.task.name
    yield from template_problems(data.template, key_of(name, "template"))
    if both := [column for column in data.template if column in data.columns]:
        rule = f"{', '.join(both)} is in {key_of(name, 'columns')} too"
        yield Problem(key_of(name, "template"), rule, "name a column once")
    found = data.format
    if found == "auto":
        ours = dict.fromkeys([*data.template, *data.columns])
        if data.template and detect(ours, task=task) is None:
            known = "; ".join(f"{n}: {', '.join(form.required)}" for n, form in FORMATS.items() if task in form.tasks)
            rule = f"rows with the columns {', '.join(ours)} are of no known format"
            yield Problem(key_of(name, "template"), rule, f"give the columns of one of task={task}'s ({known})")
        return
    if task in FORMATS[found].tasks:
        return
    known = ", ".join(name for name, form in FORMATS.items() if task in form.tasks)
    rule = f"{found} is not a format of task={task}, which knows auto, {known}"
    way_out = f"choose task={' or '.join(FORMATS[found].tasks)}, or correct the format"
    yield Problem(key_of(name, "format"), rule, way_out)


def choice_problems(config: RunConfig) -> Iterator[Problem]:
    """Wishes that cannot be fulfilled, as far as it is known before data is read."""
    data, task = config.data, config.task
    for key in ("k_shot", "folds"):
        if data.mixture is not None and getattr(data, key) is not None:
            rule = "a mixture's sets have no labels or folds in common"
            own = " or give it to sets: data.mixture.NAME.k_shot" if key == "k_shot" else " or take one set: data.train"
            yield Problem(f"data.{key}", rule, f"remove it,{own}")
    shots = {ALONE: data.k_shot, **{name: part.k_shot for name, part in (data.mixture or {}).items()}}
    for name, k_shot in shots.items():
        if k_shot is not None and not has_labels(config):
            several = "have several labels" if task.name == "sequence_classification" else "have no label"
            rule = f"takes so many rows of each label, and task={task.name} cannot: its rows {several}"
            way_out = "remove it, or choose task=sequence_classification without multi_label"
            yield Problem(key_of(name, "k_shot"), rule, way_out)
    if data.folds is not None and data.validation:
        rule = "data.validation is given too, and a fold of data.train is to be the validation data"
        yield Problem("data.folds", rule, "remove one of the two")
    if data.folds is not None and (data.fold or 0) >= data.folds:
        yield Problem("data.fold", f"there are folds 0 to {data.folds - 1}", "name one of them")


# Of each task's canonical rows (formats.py) the columns that may change while everything else keeps its meaning.
AUGMENTABLE = {
    "causal_lm": ("text",),
    "masked_lm": ("text",),
    "instruction": ("messages", "prompt", "completion"),
    "sequence_classification": ("text", "text_pair"),
    "token_classification": ("tokens",),
    "seq2seq": ("source", "target", "prompt", "completion"),
    "question_answering": ("question",),
    "preference": ("prompt", "chosen", "rejected"),
    "reward": ("prompt", "chosen", "rejected"),
}
_REASONS = {
    "context": "answers are places in the context, which a changed one would move",
    "answers": "answers are places in the context",
    "tags": "tags are what is learned",
    "label": "labels are what is learned",
    "input_ids": "token ids are no text",
}


def augment_problems(config: RunConfig) -> Iterator[Problem]:
    """Columns that must not change or do not exist, and runs in which copies would be wrong."""
    if config.data.mixture is not None and config.data.augment is not None:
        rule = "nothing reads it: each set of data.mixture has its own"
        yield Problem("data.augment", rule, "set it as a key of the set, data.mixture.NAME.augment")
        return
    for name, alone in sets_of(config).items():
        if (augment := alone.data.augment) is None:
            continue
        key = key_of(name, "augment")
        if config.privacy.is_on:
            rule = "a row and its copies would be several samples, and the noise hides one"
            yield Problem(key, rule, "remove it, or the keys of privacy")
        if alone.data.format == "tokens":
            yield Problem(key, "rows of token ids have no text to change", "remove it, or give rows of text")
            continue
        known = AUGMENTABLE[config.task.name]
        if twice := sorted({column for column in augment.columns if augment.columns.count(column) > 1}):
            yield Problem(f"{key}.columns", f"{', '.join(twice)} stands there more than once", "name a column once")
        for column in augment.columns:
            if column not in known:
                rule = f"{column} is no text of task={config.task.name} that may change"
                rule = f"{column} must stay: {_REASONS[column]}" if column in _REASONS else rule
                yield Problem(f"{key}.columns", rule, f"name one of {', '.join(known)}")
