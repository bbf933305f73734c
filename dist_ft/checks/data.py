"""Checks of the data: sources, mixtures, formats, templates, subsets and augmentation."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from ..config.data import held_out
from ..config.run import RunConfig
from ..config.task import SHIPPED_TEMPLATES
from ..data.read.chosen import has_labels
from ..data.read.faults import InvalidRow, Tally, describe_cause
from ..data.read.fill import template_problems
from ..data.read.formats import FORMATS, detect
from ..data.read.messages import RESERVED
from ..data.read.rows import RawRow, read_rows
from ..data.read.sets import ALONE, SPLITS, key_of, sets_of
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem

FIRST_ROWS = 20  # read from each file, enough to detect a wrong encoding, delimiter or format


def chat_template_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the file of `task.chat_template` exists, and the keys that go with it."""
    template = getattr(config.task, "chat_template", None)
    if template not in (None, *SHIPPED_TEMPLATES) and not Path(template).is_file():
        yield Problem(
            "task.chat_template",
            f"the file {template} does not exist",
            f"set task.chat_template to a Jinja file, or to one of {', '.join(SHIPPED_TEMPLATES)}",
        )

    given = [name for name in getattr(config.task, "chat_template_kwargs", {}) if name in RESERVED]
    if given:
        rule = f"{', '.join(given)} of the chat template comes from the rows"
        yield Problem("task.chat_template_kwargs", rule, "remove it")
    if getattr(config.task, "one_row_per_turn", False) and getattr(config.task, "train_on", None) == "all":
        rule = "with task.train_on=all, each sequence of a row would train the turns before it again"
        yield Problem("task.one_row_per_turn", rule, "set task.train_on=assistant, or remove it")


def data_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that sources exist and that their first rows can be read; all rows are checked when they are prepared."""
    for split in SPLITS:
        for name, alone in sets_of(config, split).items():
            if alone.data.source_split(split) == split:  # else the rows are held out from those of data.train
                key = key_of(name, split)
                yield from (replace(found, where=f"{key}, {found.where}") for found in _first_rows(alone, split))


def _first_rows(alone: RunConfig, split: str) -> Iterator[Problem]:
    data = alone.data
    given = data.sources(split) or []
    for source in [given] if isinstance(given, str) else given:
        try:
            for file in resolve(source, split):
                if not isinstance(file, HubSet):
                    rows = read_rows(str(file), split=split, delimiter=data.delimiter, sample_by=data.sample_by)
                    found = list(_invalid(itertools.islice(rows, FIRST_ROWS)))
                    yield from found if data.invalid_rows == "error" else ()
        except DistFtError as error:
            yield from error.problems


def _invalid(rows: Iterable[tuple[str, RawRow]]) -> Iterator[Problem]:
    """Yield a problem for each cause for which some of the rows cannot be read."""
    tallies: dict[str, Tally] = {}
    for place, row in rows:
        if isinstance(row, InvalidRow):
            tallies.setdefault(row.cause, Tally(row.way_out, row.seen)).add(place)
    for cause, tally in tallies.items():
        rule = f"{describe_cause(cause, tally.seen)}; {tally.rows} of the first {FIRST_ROWS} rows, such as "
        way_out = f"{tally.way_out}, or set data.invalid_rows=drop"
        yield Problem(tally.places[0], rule + ", ".join(tally.places), way_out)


def set_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that each set is given exactly once, that the task supports its format, and that its template is valid."""
    data, mixture = config.data, config.data.mixture
    if mixture is None and not data.train:
        yield Problem("data.train", "is not set", "set data.train=VALUE, or data.mixture={NAME: {train: …}, …}")
        return
    if mixture is not None:
        given = [key for key in ("train", "validation", "test") if getattr(data, key)]
        if given:
            rule = f"data.{given[0]} is also set, but each set of a mixture has its own"
            yield Problem(
                "data.mixture", rule, f"remove data.{given[0]} (data=mixture does not set it), or remove data.mixture"
            )
            return
        if not mixture:
            yield Problem("data.mixture", "contains no data set", "set data.mixture.NAME.train=VALUE for each data set")
            return
        weighted = [name for name, part in mixture.items() if part.weight is not None]
        if 0 < len(weighted) < len(mixture):
            bare = next(name for name in mixture if name not in weighted)
            rule = f"{bare} has no weight, but {weighted[0]} has one"
            yield Problem("data.mixture", rule, "set a weight for all sets or for none")
    for name, alone in sets_of(config).items():
        yield from _format_problems(alone, name)
        if (share := held_out(alone.data.validation)) is not None and not 0 < share < 1:
            yield Problem(key_of(name, "validation"), "must be more than 0% and less than 100%", "set 10%, for example")


def _format_problems(alone: RunConfig, name: str) -> Iterator[Problem]:
    data, task = alone.data, alone.task.name
    yield from template_problems(data.template, key_of(name, "template"))
    if both := [column for column in data.template if column in data.columns]:
        rule = f"{', '.join(both)} is also in {key_of(name, 'columns')}"
        yield Problem(key_of(name, "template"), rule, "use each column in only one of them")
    found = data.format
    if found == "auto":
        ours = dict.fromkeys([*data.template, *data.columns])
        if data.template and detect(ours, task=task) is None:
            known = "; ".join(f"{n}: {', '.join(form.required)}" for n, form in FORMATS.items() if task in form.tasks)
            rule = f"the columns {', '.join(ours)} match no supported format"
            yield Problem(key_of(name, "template"), rule, f"use the columns of a format of task={task} ({known})")
        return
    if task in FORMATS[found].tasks:
        return
    known = ", ".join(name for name, form in FORMATS.items() if task in form.tasks)
    rule = f"format {found} is not supported with task={task}; supported formats: auto, {known}"
    way_out = f"set task={' or '.join(FORMATS[found].tasks)}, or change the format"
    yield Problem(key_of(name, "format"), rule, way_out)


def choice_problems(config: RunConfig) -> Iterator[Problem]:
    """Check `k_shot` and `folds` as far as possible without reading the data."""
    data, task = config.data, config.task
    for key in ("k_shot", "folds"):
        if data.mixture is not None and getattr(data, key) is not None:
            rule = "the sets of a mixture do not share labels or folds"
            own = " or set data.mixture.NAME.k_shot" if key == "k_shot" else " or use a single data set (data.train)"
            yield Problem(f"data.{key}", rule, f"remove it,{own}")
    shots = {ALONE: data.k_shot, **{name: part.k_shot for name, part in (data.mixture or {}).items()}}
    for name, k_shot in shots.items():
        if k_shot is not None and not has_labels(config):
            several = "have several labels" if task.name == "sequence_classification" else "have no label"
            rule = f"selects rows per label, which is not supported with task={task.name}: its rows {several}"
            way_out = "remove it, or set task=sequence_classification and task.multi_label=false"
            yield Problem(key_of(name, "k_shot"), rule, way_out)
    if data.folds is not None and data.validation:
        rule = "data.validation is also set, but the validation data is a fold of data.train"
        yield Problem("data.folds", rule, "remove data.folds or data.validation")
    if data.folds is not None and (data.fold or 0) >= data.folds:
        yield Problem("data.fold", f"must be between 0 and {data.folds - 1}", "set data.fold to a value in this range")


# Columns of each task's canonical rows (data/read/formats.py) that can change without invalidating the other columns.
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
    "context": "answers are positions in the context, which augmentation would shift",
    "answers": "answers are positions in the context",
    "tags": "tags are the training target",
    "label": "labels are the training target",
    "input_ids": "token ids are not text",
}


def augment_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that the augmented columns exist and can change, and that the run supports augmented copies."""
    if config.data.mixture is not None and config.data.augment is not None:
        rule = "has no effect: each set of data.mixture has its own"
        yield Problem("data.augment", rule, "set data.mixture.NAME.augment instead")
        return
    for name, alone in sets_of(config).items():
        if (augment := alone.data.augment) is None:
            continue
        key = key_of(name, "augment")
        if config.privacy.is_on:
            rule = "a row and its copies are several samples, but the noise only hides a single sample"
            yield Problem(key, rule, "remove it, or remove the privacy keys")
        if alone.data.format == "tokens":
            yield Problem(key, "rows of token ids contain no text to augment", "remove it, or use rows of text")
            continue
        known = AUGMENTABLE[config.task.name]
        if twice := sorted({column for column in augment.columns if augment.columns.count(column) > 1}):
            yield Problem(f"{key}.columns", f"{', '.join(twice)} is listed more than once", "list each column once")
        for column in augment.columns:
            if column not in known:
                rule = f"{column} is not a text column of task={config.task.name} that can be augmented"
                rule = f"{column} cannot be augmented: {_REASONS[column]}" if column in _REASONS else rule
                yield Problem(f"{key}.columns", rule, f"use one of {', '.join(known)}")
