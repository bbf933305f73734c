"""Prompts as the run's task shows them to the model, and what ends an answer."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

from ..config.run import RunConfig
from ..data.read.chosen import read_split
from ..data.read.faults import RowFault
from ..data.read.formats import normalise_for
from ..data.read.sets import SplitName, sets_of
from ..data.render.template import CONVERSING, ChatTokenizer
from ..errors import RequestError

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """What a model is asked: messages for a chat template, or plain text; and the data's own answer, if it has one."""

    messages: Sequence[Message] | None
    text: str
    answer: str | None = None
    tools: Sequence[Any] | None = None

    @classmethod
    def of_text(cls, text: str, *, chat: bool) -> Question:
        """A user's message, or text to go on from."""
        return cls([{"role": "user", "content": text}] if chat else None, text)

    def encode(self, tokenizer: Any) -> list[int]:
        """Token ids up to where the answer begins."""
        if self.messages is None:
            ids: list[int] = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            chat = ChatTokenizer(tokenizer)
            begins = chat.adds_bos and chat.bos_id is not None and ids[:1] != [chat.bos_id]
            return [chat.bos_id, *ids] if begins else ids  # type: ignore[list-item]
        rendered = tokenizer.apply_chat_template(
            list(self.messages),
            tools=list(self.tools) if self.tools else None,
            add_generation_prompt=True,
            tokenize=True,
            return_dict=True,
        )
        return list(rendered["input_ids"])


def speaks_chat(config: RunConfig, tokenizer: Any, formats: Sequence[str]) -> bool:
    """Whether the run's rows went through the chat template, so that prompts must too."""
    if config.task.name not in CONVERSING or not tokenizer.chat_template:
        return False
    if list(formats) == ["pairs"]:  # of text or of messages
        return next(read_questions(config, "train", 1)).messages is not None
    return list(formats) != ["prompt_completion"]


def read_questions(config: RunConfig, split: SplitName, count: int) -> Iterator[Question]:
    """The first `count` rows of a split, of a mixture those of each set, each up to its last answer.

    Raises:
        RequestError: the run has no such split, or a row is wrong or made of tokens.
    """
    for place, row in read_canonical(config, split, count):
        yield question_of(row, place)


def read_canonical(config: RunConfig, split: SplitName, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and canonical shape (data/formats.py) of the first `count` rows of a split, of a mixture those of each set.

    Raises:
        RequestError: the run has no such split, or a row is wrong.
    """
    sets = sets_of(config, split)
    if not sets:
        raise RequestError.of(f"data.{split}", "is not set in this run", "name another split, or a file of prompts")
    for alone in sets.values():
        yield from islice(_canonical(alone, read_split(alone, split)), count)


def _canonical(alone: RunConfig, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Rows of a set; those that lack what its template names are passed over."""
    for place, raw in rows:
        with contextlib.suppress(RowFault):
            yield place, normalise_for(alone, raw, place)[1]


def question_of(row: dict[str, Any], place: str) -> Question:
    """A canonical row (see data/formats.py) as a question.

    Raises:
        RequestError: the row is tokens.
    """
    if "chosen" in row:
        if isinstance(row["prompt"], str):
            return Question(None, row["prompt"], row["chosen"])
        row = {**row, "messages": [*row["prompt"], *row["chosen"][:1]]}
    if "messages" in row:
        messages = row["messages"]
        turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
        stop = turns[-1] if turns else len(messages)
        shown = next((str(m.get("content", "")) for m in reversed(messages[:stop]) if m["role"] != "assistant"), "")
        answer = messages[stop].get("content") if turns else None
        return Question(messages[:stop], shown, answer, row.get("tools"))
    if "prompt" in row:
        return Question(None, row["prompt"], row["completion"])
    if "text" in row:
        words = row["text"].split()
        half = max(1, min(16, len(words) // 2))
        return Question(None, " ".join(words[:half]), " ".join(words[half:]))
    raise RequestError.of(place, "is a row of tokens, not of text", "give prompts by prompt=… or prompts=FILE")
