"""What `data.augment` may change, and what its rows depend on; nlpaug is not imported, as the launcher asks."""

from __future__ import annotations

import importlib.metadata
import sys
from collections.abc import Iterator
from importlib.util import find_spec
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
    """What the copies of a split's rows depend on beside them; None where there are none."""
    augment = alone.data.augment
    if augment is None or split != "train":
        return None
    version = importlib.metadata.version("nlpaug") if find_spec("nlpaug") else None
    return {**augment.model_dump(mode="json"), "seed": alone.train.seed, "nlpaug": version}


def missing_nlpaug(key: str) -> Problem | None:
    """What is wrong where nlpaug is not installed."""
    if find_spec("nlpaug") is not None:
        return None
    rule = f"it needs the package nlpaug, which is not installed in {sys.executable}"
    return Problem(key, rule, "pip install 'dist-ft[augment]', or remove it")
