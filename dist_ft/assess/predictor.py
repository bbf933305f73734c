"""A model that is asked about one row, and says what an evaluation would write of it."""

from __future__ import annotations

import functools
import json
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import nn

from ..config.run import RunConfig
from ..data.read.faults import RowFault
from ..data.read.sets import SplitName
from ..data.render.template import ChatTokenizer
from ..data.store.ledger import Ledger
from ..data.store.split import limit_length
from ..errors import RequestError
from ..state import ORIGIN, Facts, Prediction, Row, Sample, Task
from .turns import read_canonical

Given = Mapping[str, Any]  # columns of a prompt


@dataclass(frozen=True)
class Asked:
    """A row, what is shown of it, and what the data say of it."""

    row: Row
    text: str
    answer: str | None = None


class Predictor(ABC):
    """A model that says of rows what its task predicts; a subclass is of a task, and knows how its rows look.

    Args:
        name: shown beside what it says.
        model: of transformers or peft, where it computes.
        task: of the run.
        facts: of the run's data.
        tokenizer: of the run.
        chat: whether prompts are a user's words in a conversation.
    """

    columns: ClassVar[tuple[str, ...]]  # of a prompt; of a single one, plain text will do
    optional: ClassVar[tuple[str, ...]] = ()

    def __init__(
        self, name: str, model: nn.Module, task: Task, facts: Facts, tokenizer: ChatTokenizer, *, chat: bool = False
    ) -> None:
        self.name = name
        self.model = model.eval()
        self.task = task
        self.facts = facts
        self.tokenizer = tokenizer
        self.chat = chat

    @abstractmethod
    def row(self, given: Given) -> Row:
        """A canonical row (see data/formats.py) of a prompt's columns."""

    @abstractmethod
    def text(self, row: Row) -> str:
        """What is shown of a row."""

    @abstractmethod
    def say(self, prediction: Prediction, row: Row) -> str:
        """A prediction as text."""

    def known(self, prediction: Prediction, row: Row) -> str | None:
        """What the data say of a row; a prediction has both."""
        return None

    def ask(self, prompt: str) -> Asked:
        """A prompt as a row.

        Raises:
            RequestError: it is neither text of the only column nor an object of the columns.
        """
        given = _read_object(prompt) or {self.columns[0]: prompt}
        if not set(self.columns) <= set(given) <= {*self.columns, *self.optional} or not all(given.values()):
            example = json.dumps(dict.fromkeys(self.columns, "…"), ensure_ascii=False)
            more = f" (and {', '.join(self.optional)})" if self.optional else ""
            rule = f"the task asks with {' and '.join(self.columns)}{more}, and {prompt!r:.60} has not just these"
            raise RequestError.of("prompt", rule, f"give a JSON object: prompt='{example}'")
        row = self.row(given)
        return Asked(row, self.text(row))

    def read(self, config: RunConfig, split: SplitName, count: int) -> Iterator[Asked]:
        """The first rows of a split, with what the data say of them.

        Raises:
            RequestError: the run has no such split, or a row is wrong.
        """
        for _, row in read_canonical(config, split, count):
            yield Asked(row, self.text(row), self.known(self.predict(row), row))

    def answer(self, asked: Asked) -> str:
        """What the model says."""
        return self.say(self.predict(asked.row), asked.row)

    @torch.no_grad()
    def predict(self, row: Row) -> Prediction:
        """What an evaluation writes of the row; longer ones are cut as with `task.overlong=truncate`.

        Raises:
            RequestError: nothing can be said of it.
        """
        task, layout = self.task, self.task.layout
        shorten = functools.partial(task.truncate, row, self.tokenizer)
        try:
            sequences = limit_length(
                task.encode(row, self.tokenizer), task, "truncate", "prompt", Ledger(), shorten
            )  # fmt: skip
        except RowFault as fault:
            raise RequestError.of("prompt", fault.cause, "ask otherwise") from fault
        assert sequences is not None, "only overlong=drop drops"
        origin = {ORIGIN: [0]} if ORIGIN in layout.row_columns else {}
        segments = [{n: np.asarray(v) for n, v in {**sequence, **origin}.items()} for sequence in sequences]
        size = layout.sequences
        samples = [Sample(segments[i : i + size], i // size) for i in range(0, len(segments), size)]
        device = next(self.model.parameters()).device
        totals = task.score(self.model, task.collate(samples).to(device))
        join = getattr(task, "by_row", None)  # of tasks that make several samples of a row
        (prediction,) = join(totals, [row]) if join else totals.predictions
        return prediction


def _read_object(prompt: str) -> dict[str, Any] | None:
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        return dict(json.loads(prompt))
    except ValueError:  # text may begin with a brace
        return None
