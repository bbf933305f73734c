"""What `data.augment` may name, and what its rows depend on. Nothing is imported that it names: the launcher asks."""

from __future__ import annotations

import hashlib
import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from ..errors import Problem
from ..schema import RunConfig
from .sets import key_of, sets_of
from .splits import SplitName

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


_INSTALLED = {"site-packages", "dist-packages"}


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


def augment_identity(alone: RunConfig, split: SplitName) -> dict[str, Any] | None:
    """What the copies of a split's rows depend on beside them; None where there are none.

    The library's version is in it, or the text of a module of one's own.
    """
    augment = alone.data.augment
    if augment is None or split != "train":
        return None
    return {**augment.model_dump(mode="json"), "seed": alone.train.seed, "code": _code_of(augment.target)}


def locate(target: str) -> ModuleSpec | None:
    """Where the top package of a dotted name is: in the working directory or on Python's path; None if nowhere."""
    return PathFinder.find_spec(target.partition(".")[0], [str(Path.cwd()), *sys.path])


def missing_package(target: str, key: str) -> Problem | None:
    """What is wrong where the top package of `target` is not there."""
    if locate(target) is not None:
        return None
    package = target.partition(".")[0]
    rule = f"{target} needs the package {package}, which is not installed in {sys.executable}"
    way_out = f"pip install {package}; a module of your own must be in the working directory or on PYTHONPATH"
    return Problem(f"{key}.target", rule, way_out)


def _code_of(target: str) -> Any:
    """A distribution's name and version, or a digest of a package that belongs to none; None where it is missing."""
    package, spec = target.partition(".")[0], locate(target)
    if spec is None:
        return None
    if _INSTALLED & {folder.name for folder in Path(spec.origin or "").parents}:
        for name in (package, *importlib.metadata.packages_distributions().get(package, [])):
            try:
                return [name, importlib.metadata.version(name)]
            except importlib.metadata.PackageNotFoundError:
                continue
    folders = list(spec.submodule_search_locations or ())
    files = sorted(file for folder in folders for file in Path(folder).rglob("*.py"))
    files = files or [Path(spec.origin or "")]
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes() if file.is_file() else b"")
    return ["source", digest.hexdigest()]
