"""Base class of predictors, which predict for a single row what an evaluation writes for it."""

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
from ..data.store.encode import limit_length
from ..data.store.ledger import Ledger
from ..errors import RequestError
from ..protocols import Task
from ..state import ORIGIN, Facts, Prediction, Row, Sample
from .turns import read_canonical

Given = Mapping[str, Any]  # column name → value of a prompt


@dataclass(frozen=True)
class Asked:
    """Row to predict."""

    row: Row
    text: str  # displayed prompt
    answer: str | None = None  # label from the data, as displayed


class Predictor(ABC):
    """Model that predicts single rows of its task; each subclass implements the row format of one task.

    Args:
        name: name shown with the predictions.
        model: transformers or PEFT model on the device where it computes.
        task: task of the run.
        facts: facts about the run's data.
        tokenizer: tokenizer of the run.
        chat: whether prompts are user messages of a conversation.
    """

    columns: ClassVar[tuple[str, ...]]  # required fields of a prompt; a plain text prompt is the first one
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
        """Convert the fields of a prompt to a canonical row (see data/read/formats.py)."""

    @abstractmethod
    def text(self, row: Row) -> str:
        """Return the displayed prompt of a row."""

    @abstractmethod
    def say(self, prediction: Prediction, row: Row) -> str:
        """Return the displayed text of a prediction."""

    def known(self, prediction: Prediction, row: Row) -> str | None:
        """Return the displayed label of a row, if it has one; predictions of labeled rows contain the label."""
        return None

    def ask(self, prompt: str) -> Asked:
        """Convert a prompt to a row.

        Raises:
            RequestError: If the prompt is neither text for a single field nor a JSON object with the required fields.
        """
        given = _read_object(prompt) or {self.columns[0]: prompt}
        if not set(self.columns) <= set(given) <= {*self.columns, *self.optional} or not all(given.values()):
            example = json.dumps(dict.fromkeys(self.columns, "…"), ensure_ascii=False)
            more = f" (optionally {', '.join(self.optional)})" if self.optional else ""
            rule = f"the task requires {' and '.join(self.columns)}{more}, which does not match {prompt!r:.60}"
            raise RequestError.of("prompt", rule, f"set a JSON object: prompt='{example}'")
        row = self.row(given)
        return Asked(row, self.text(row))

    def read(self, config: RunConfig, split: SplitName, count: int) -> Iterator[Asked]:
        """Yield the first `count` rows of a split with their labels.

        Raises:
            RequestError: If the run has no such split or a row is invalid.
        """
        for _, row in read_canonical(config, split, count):
            yield Asked(row, self.text(row), self.known(self.predict(row), row))

    def answer(self, asked: Asked) -> str:
        """Return the displayed prediction."""
        return self.say(self.predict(asked.row), asked.row)

    @torch.no_grad()
    def predict(self, row: Row) -> Prediction:
        """Predict a row as an evaluation does; overlong rows are truncated as with `task.overlong=truncate`.

        Raises:
            RequestError: If the row cannot be encoded.
        """
        task, layout = self.task, self.task.layout
        shorten = functools.partial(task.truncate, row, self.tokenizer)
        try:
            sequences = limit_length(
                task.encode(row, self.tokenizer), task, "truncate", "prompt", Ledger(), shorten
            )  # fmt: skip
        except RowFault as fault:
            raise RequestError.of("prompt", fault.cause, "change the prompt") from fault
        assert sequences is not None, "only overlong=drop drops"
        origin = {ORIGIN: [0]} if ORIGIN in layout.row_columns else {}
        segments = [{n: np.asarray(v) for n, v in {**sequence, **origin}.items()} for sequence in sequences]
        size = layout.sequences
        samples = [Sample(segments[i : i + size], i // size) for i in range(0, len(segments), size)]
        device = next(self.model.parameters()).device
        totals = task.score(self.model, task.collate(samples).to(device))
        join = getattr(task, "by_row", None)  # defined by tasks that split a row into several samples
        (prediction,) = join(totals, [row]) if join else totals.predictions
        return prediction


def _read_object(prompt: str) -> dict[str, Any] | None:
    if not prompt.lstrip().startswith("{"):
        return None
    try:
        return dict(json.loads(prompt))
    except ValueError:  # plain text may also start with a brace
        return None
