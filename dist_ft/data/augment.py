"""Changed copies of training rows by a library that the configuration names, the same whenever they are made.

A copy depends on the run's seed, the row's number in its source and the copy's number alone: Python's, numpy's and
torch's generators are set before each call and put back behind it.
"""

from __future__ import annotations

import contextlib
import difflib
import functools
import importlib
import inspect
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..errors import MachineError, RequestError
from ..schema import RunConfig
from ..schema_augment import AugmentConfig
from .augment_rules import missing_package
from .splits import SplitName

PROVEN_CALLS = 3  # that are made twice, to see whether a hook draws from what can be set

Hook = Callable[[str], Any]


class Augmenter:
    """Copies of canonical rows (formats.py).

    Args:
        augment: what is to be done.
        seed: of the run.
        key: of the configuration, for errors.

    Raises:
        RequestError: the target names nothing, or cannot be made with its options.
        MachineError: its package is not installed.
    """

    def __init__(self, augment: AugmentConfig, seed: int, key: str = "data.augment") -> None:
        self.augment, self.seed, self.key = augment, seed, key
        with _drawing_from((seed,)):
            self._hook = open_hook(augment, key)
        self._unproven = PROVEN_CALLS
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
            RequestError: the hook fails, gives what is no text, or is not the same for the same seed.
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
        found = self._call(text, draw, place)
        if self._unproven:
            self._unproven -= 1
            if self._call(text, draw, place) != found:
                rule = f"{self.augment.target} gives other texts for the same row and seed ({place})"
                way_out = "name what draws from Python's random, numpy.random or torch, not from a generator of its own"
                raise RequestError.of(f"{self.key}.target", rule, way_out)
        return next((other for other in found if other != text), text)

    def _call(self, text: str, draw: tuple[int, ...], place: str) -> Sequence[str]:
        try:
            with _drawing_from(draw):
                found = self._hook(text)
        except Exception as error:  # whatever a library raises
            rule = f"{self.augment.target} fails at {place} ({_told(error)})"
            raise RequestError.of(self.key, rule, "mend it, or correct its options") from error
        texts = [found] if isinstance(found, str) else found
        if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
            rule = f"{self.augment.target} gives {found!r:.60} at {place}, neither a text nor a list of texts"
            raise RequestError.of(f"{self.key}.target", rule, "name what turns a text into texts")
        return texts


def open_hook(augment: AugmentConfig, key: str = "data.augment") -> Hook:
    """What turns a text into a text or a list of them.

    A class is called with the options, and of its object `augment`, or the object itself, with the text. A function, or
    an object that is there already, is called with the text and the options.

    Raises:
        RequestError: there is no such name, it takes other options, or cannot be called.
        MachineError: a package is not installed.
    """
    found, options = _find(augment.target, key), augment.options
    if inspect.isclass(found):
        try:
            found, options = found(**options), {}
        except Exception as error:  # whatever a library raises
            rule = f"{augment.target} cannot be made with these options ({_told(error)})"
            raise RequestError.of(f"{key}.options", rule, "see the library's documentation") from error
    hook: Any = getattr(found, "augment", found)
    if not callable(hook):
        rule = f"{augment.target} has no `augment`, and cannot be called"
        raise RequestError.of(f"{key}.target", rule, "name a class or a function that changes text")
    return functools.partial(hook, **options)


def _find(target: str, key: str) -> Any:
    """What the dotted name stands for, imported from the working directory or Python's path."""
    if problem := missing_package(target, key):
        raise MachineError(problem)
    if str(Path.cwd()) not in sys.path and "" not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    parts = target.split(".")
    for length in range(len(parts) - 1, 0, -1):
        name = ".".join(parts[:length])
        try:
            found: Any = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is not None and f"{name}.".startswith(f"{error.name}."):
                continue  # a part of the name is no module, but may be a class
            way_out = f"pip install {error.name}"
            raise MachineError.of(f"{key}.target", f"{name} needs the package {error.name}", way_out) from error
        except Exception as error:  # whatever a module does when it is imported
            rule = f"{name} cannot be imported ({_told(error)})"
            raise RequestError.of(f"{key}.target", rule, "mend or update it") from error
        for at in range(length, len(parts)):
            if not hasattr(found, parts[at]):
                near = difflib.get_close_matches(parts[at], dir(found), n=1)
                way_out = f"did you mean {'.'.join([*parts[:at], near[0]])}?" if near else "correct the name"
                raise RequestError.of(f"{key}.target", f"{'.'.join(parts[:at])} has no {parts[at]}", way_out)
            found = getattr(found, parts[at])
        return found
    raise RequestError.of(f"{key}.target", f"there is no module {'.'.join(parts[:-1])}", "correct the name")


@contextlib.contextmanager
def _drawing_from(draw: tuple[int, ...]) -> Iterator[None]:
    """Generators that everybody shares begin at `draw`, and go on behind it as if nothing had been."""
    seed = int(np.random.SeedSequence(draw).generate_state(1)[0])
    python, numpy = random.getstate(), np.random.get_state()
    devices = range(torch.cuda.device_count()) if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices=devices):
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(numpy)


def _told(error: BaseException) -> str:
    lines = (line.strip(" *") for line in str(error).splitlines())  # some libraries frame their messages
    return f"{type(error).__name__}: {next((line for line in lines if line), '')}"
