"""Changed copies of training rows by nlpaug (Ma 2019), the same whenever they are made.

A copy depends on the run's seed, the row's number in its source and the copy's number alone: Python's and numpy's
generators, from which nlpaug draws, are set before each call and put back behind it.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.metadata
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import numpy as np

from ...config.data import AugmentConfig
from ...config.run import RunConfig
from ...errors import MachineError, Problem, RequestError
from .sets import SplitName

MODULES = {  # of nlpaug.augmenter
    "KeyboardAug": "char",
    "OcrAug": "char",
    "RandomCharAug": "char",
    "RandomWordAug": "word",
    "SpellingAug": "word",
    "SplitAug": "word",
}


class Augmenter:
    """Copies of canonical rows (formats.py).

    Args:
        augment: what is to be done.
        seed: of the run.
        key: of the configuration, for errors.

    Raises:
        RequestError: the augmenter cannot be made with its options.
        MachineError: nlpaug is not installed.
    """

    def __init__(self, augment: AugmentConfig, seed: int, key: str = "data.augment") -> None:
        self.augment, self.seed, self.key = augment, seed, key
        with _drawing_from((seed,)):
            self._augment = open_augmenter(augment, key)
        self._met: set[str] = set()

    @classmethod
    def of(cls, alone: RunConfig, split: SplitName) -> Augmenter | None:
        """That of a set's split; None where nothing is augmented."""
        augment = alone.data.augment
        return None if augment is None or split != "train" else cls(augment, alone.train.seed)

    def copies(self, row: Mapping[str, Any], number: int, place: str) -> Iterator[dict[str, Any] | None]:
        """As many as are wished; None for one that is as the row or as an earlier copy.

        Args:
            row: in its canonical shape.
            number: of the row in its source.
            place: of the row, for errors.

        Raises:
            RequestError: nlpaug fails.
        """
        seen: list[Mapping[str, Any]] = [row]
        for copy in range(self.augment.copies):
            changed = dict(row)
            for at, column in enumerate(self.augment.columns):
                if row.get(column) is not None:
                    self._met.add(column)
                    changed[column] = self._change(row[column], (self.seed, number, copy, at), place)
            is_new = changed not in seen
            seen.append(changed)
            yield changed if is_new else None

    def require_columns(self) -> None:
        """See that every column was met.

        Raises:
            RequestError: no row had one of them.
        """
        if missing := [column for column in self.augment.columns if column not in self._met]:
            rule = f"no row has {', '.join(missing)}"
            raise RequestError.of(f"{self.key}.columns", rule, "name columns of the format; dist-ft data shows rows")

    def _change(self, value: Any, draw: tuple[int, ...], place: str) -> Any:
        """A text; words one by one, so that each keeps its tag; of messages what the user says."""
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
        except Exception as error:  # whatever the library raises
            rule = f"{self.augment.name} fails at {place} ({_told(error)})"
            raise RequestError.of(self.key, rule, "correct its options") from error
        return next((other for other in found if other != text), text)


def open_augmenter(augment: AugmentConfig, key: str = "data.augment") -> Callable[[str], Sequence[str]]:
    """What turns a text into changed ones.

    Raises:
        RequestError: the augmenter does not take its options.
        MachineError: nlpaug is not installed.
    """
    if problem := missing_nlpaug(key):
        raise MachineError(problem)
    kind = getattr(importlib.import_module(f"nlpaug.augmenter.{MODULES[augment.name]}"), augment.name)
    try:
        augmenter: Callable[[str], Sequence[str]] = kind(**augment.options).augment
    except Exception as error:  # whatever the library raises
        rule = f"{augment.name} cannot be made with these options ({_told(error)})"
        raise RequestError.of(f"{key}.options", rule, "see nlpaug's documentation") from error
    return augmenter


@contextlib.contextmanager
def _drawing_from(draw: tuple[int, ...]) -> Iterator[None]:
    """Generators that everybody shares begin at `draw`, and go on behind it as if nothing had been."""
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
    lines = (line.strip(" *") for line in str(error).splitlines())  # some libraries frame their messages
    return f"{type(error).__name__}: {next((line for line in lines if line), '')}"


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
