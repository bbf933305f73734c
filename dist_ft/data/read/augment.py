"""Deterministic data augmentation of training rows with nlpaug (Ma 2019).

An augmented copy depends only on the seed of the run, the index of the row in its source and the index of the copy.
nlpaug draws from the global generators of Python and NumPy, which are seeded before each call and restored afterwards.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import random
import sys
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...config.data import AugmentConfig
from ...config.run import RunConfig
from ...errors import MachineError, Problem, RequestError
from .sets import SplitName

MODULES = {  # augmenter class -> submodule of nlpaug.augmenter
    "KeyboardAug": "char",
    "OcrAug": "char",
    "RandomCharAug": "char",
    "RandomWordAug": "word",
    "SpellingAug": "word",
    "SplitAug": "word",
}


class Augmenter:
    """Augmenter that makes changed copies of canonical rows (see formats.py).

    Args:
        augment: Augmentation settings.
        seed: Seed of the run.
        key: Configuration key to name in errors.

    Raises:
        RequestError: The augmenter does not accept its options.
        MachineError: nlpaug is not installed.
    """

    def __init__(self, augment: AugmentConfig, seed: int, key: str = "data.augment") -> None:
        self.augment, self.seed, self.key = augment, seed, key
        with _drawing_from((seed,)):
            self._augment = open_augmenter(augment, key)
        self.met: set[str] = set()  # columns to augment that a row had

    @classmethod
    def of(cls, alone: RunConfig, split: SplitName) -> Augmenter | None:
        """Return the augmenter for a split of one dataset, or None if the split is not augmented."""
        augment = alone.data.augment
        return None if augment is None or split != "train" else cls(augment, alone.train.seed)

    def copies(self, row: Mapping[str, Any], number: int, place: str) -> Iterator[dict[str, Any] | None]:
        """Yield `augment.copies` augmented copies, with None in place of a copy equal to the row or an earlier copy.

        Args:
            row: Canonical row.
            number: Index of the row in its source.
            place: Location of the row, for errors.

        Raises:
            RequestError: nlpaug fails on the row.
        """
        seen: list[Mapping[str, Any]] = [row]
        for copy in range(self.augment.copies):
            changed = dict(row)
            for at, column in enumerate(self.augment.columns):
                if row.get(column) is not None:
                    self.met.add(column)
                    changed[column] = self._change(row[column], (self.seed, number, copy, at), place)
            is_new = changed not in seen
            seen.append(changed)
            yield changed if is_new else None

    def _change(self, value: Any, draw: tuple[int, ...], place: str) -> Any:
        """Augment a string, each word of a list (keeping tags aligned), or the user messages of a conversation."""
        if isinstance(value, str):
            return self._text(value, draw, place)
        changed: list[Any] = []
        for number, part in enumerate(value):
            if isinstance(part, str):
                word = self._text(part, (*draw, number), place)
                changed.append(word if word and len(word.split()) == 1 else part)
            elif part.get("role") == "user" and isinstance(part.get("content"), str):
                changed.append({**part, "content": self._text(part["content"], (*draw, number), place)})
            else:
                changed.append(part)
        return changed

    def _text(self, text: str, draw: tuple[int, ...], place: str) -> str:
        if not text.strip():
            return text
        try:
            with _drawing_from(draw):
                found = self._augment(text)
        except Exception as error:  # augmenters raise errors of any type
            rule = f"{self.augment.name} failed at {place} ({_told(error)})"
            raise RequestError.of(self.key, rule, "correct the augmenter's options") from error
        return next((other for other in found if other != text), text)


def require_columns(augment: AugmentConfig, met: Collection[str], key: str = "data.augment") -> None:
    """Check that every column to augment was in at least one row.

    Args:
        augment: Augmentation settings.
        met: Columns to augment that rows had.
        key: Configuration key to name in errors.

    Raises:
        RequestError: A column was in none of the rows.
    """
    if missing := [column for column in augment.columns if column not in met]:
        rule = f"no row has {', '.join(missing)}"
        raise RequestError.of(f"{key}.columns", rule, "use column names of the format; dist-ft data shows them")


def open_augmenter(augment: AugmentConfig, key: str = "data.augment") -> Callable[[str], Sequence[str]]:
    """Return the nlpaug function that maps a text to augmented texts.

    Raises:
        RequestError: The augmenter does not accept its options.
        MachineError: nlpaug is not installed.
    """
    if problem := missing_nlpaug(key):
        raise MachineError(problem)
    kind = getattr(importlib.import_module(f"nlpaug.augmenter.{MODULES[augment.name]}"), augment.name)
    try:
        augmenter: Callable[[str], Sequence[str]] = kind(**augment.options).augment
    except Exception as error:  # augmenters raise errors of any type
        rule = f"{augment.name} does not accept these options ({_told(error)})"
        raise RequestError.of(f"{key}.options", rule, "correct the options; see the nlpaug documentation") from error
    return augmenter


@contextlib.contextmanager
def _drawing_from(draw: tuple[int, ...]) -> Iterator[None]:
    """Seed the global Python and NumPy generators from `draw` inside the context and restore their states after it."""
    seed = int(np.random.SeedSequence(draw).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def _told(error: BaseException) -> str:
    lines = (line.strip(" *") for line in str(error).splitlines())  # some messages are framed with asterisks
    return f"{type(error).__name__}: {next((line for line in lines if line), '')}"


def augment_identity(alone: RunConfig, split: SplitName) -> dict[str, Any] | None:
    """Return everything besides the rows that determines a split's augmented copies, or None without augmentation."""
    augment = alone.data.augment
    if augment is None or split != "train":
        return None
    version = importlib.metadata.version("nlpaug") if find_spec("nlpaug") else None
    return {**augment.model_dump(mode="json"), "seed": alone.train.seed, "nlpaug": version}


def missing_nlpaug(key: str) -> Problem | None:
    """Return the problem to report if nlpaug is not installed, else None."""
    if find_spec("nlpaug") is not None:
        return None
    rule = f"requires the package nlpaug, which is not installed in {sys.executable}"
    return Problem(key, rule, "run pip install 'dist-ft[augment]', or remove the augmentation")
