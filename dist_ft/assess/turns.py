"""Prompts for generation, rendered and encoded as in training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

from ..config.run import RunConfig
from ..config.task import Reasoning
from ..data.read.chosen import read_split
from ..data.read.faults import RowFault
from ..data.read.formats import VARIABLES, normalise_for
from ..data.read.sets import SplitName, sets_of
from ..data.render.forms import settled
from ..data.render.special_text import SpecialText
from ..data.render.template import CONVERSING, ChatTokenizer
from ..errors import RequestError

Message = dict[str, Any]


@dataclass(frozen=True)
class Question:
    """Prompt for a model: messages for the chat template, or plain text."""

    messages: Sequence[Message] | None  # None for a plain text prompt
    text: str  # plain text prompt, or the last message as displayed
    answer: str | None = None  # answer from the data, if any
    tools: Sequence[Any] | None = None
    variables: Mapping[str, Any] | None = None  # of the chat template, for this row
    reply: Message | None = None  # the message of the data that answers; the prompt is the one that training renders

    @classmethod
    def of_text(cls, text: str, *, chat: bool, system: str | None = None) -> Question:
        """Build a question from text: a user message with `chat`, otherwise a plain text prompt to complete.

        Args:
            text: the prompt.
            chat: whether it is a message for the chat template.
            system: system message before it.
        """
        begin = [] if system is None else [{"role": "system", "content": system}]
        return cls([*begin, {"role": "user", "content": text}] if chat else None, text)

    def encode(self, tokenizer: Any, special_text: SpecialText | None = None) -> list[int]:
        """Return the token ids of the prompt, up to the start of the answer.

        Args:
            tokenizer: transformers tokenizer.
            special_text: Encoder of messages that write out special tokens.

        Raises:
            RequestError: If the chat template cannot render it.
        """
        chat = ChatTokenizer(tokenizer, special_text=special_text)
        if self.messages is None:
            ids: list[int] = tokenizer(self.text, add_special_tokens=False)["input_ids"]
            begins = chat.adds_bos and chat.bos_id is not None and ids[:1] != [chat.bos_id]
            return [chat.bos_id, *ids] if begins else ids  # type: ignore[list-item]
        try:
            variables = self.variables
            if self.reply is not None:
                variables = chat.variables_of([*self.messages, self.reply], self.tools, variables)
            return chat.encode_prompt(self.messages, self.tools, variables)
        except RowFault as fault:
            raise RequestError.of("prompt", fault.cause, fault.way_out) from fault


def speaks_chat(config: RunConfig, tokenizer: Any, formats: Sequence[str]) -> bool:
    """Return whether the chat template was applied to the training rows, so that prompts need it as well."""
    if config.task.name not in CONVERSING or not tokenizer.chat_template:
        return False
    if list(formats) == ["pairs"]:  # pairs contain either text or messages
        return next(read_questions(config, "train", 1)).messages is not None
    return list(formats) != ["prompt_completion"]


def read_questions(config: RunConfig, split: SplitName, count: int) -> Iterator[Question]:
    """Yield the first `count` rows of a split (of each set in a mixture) as prompts up to their last answer.

    Raises:
        RequestError: If the run has no such split, or a row is invalid or consists of token ids.
    """
    reasoning: Reasoning = getattr(config.task, "reasoning", "require")
    for place, row in read_canonical(config, split, count):
        question = question_of(row, place)
        if question.messages is not None:
            reply = settled([question.reply], reasoning)[0] if question.reply is not None else None
            question = replace(question, messages=settled(question.messages, reasoning), reply=reply)
        yield question


def read_canonical(config: RunConfig, split: SplitName, count: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield place and canonical form (see data/read/formats.py) of the first `count` rows of a split, or of each set.

    Raises:
        RequestError: If the run has no such split or a row is invalid.
    """
    sets = sets_of(config, split)
    if not sets:
        raise RequestError.of(f"data.{split}", "is not set in this run", "choose another split, or set prompts=FILE")
    for alone in sets.values():
        yield from islice(_canonical(alone, read_split(alone, split)), count)


def _canonical(alone: RunConfig, rows: Iterable[tuple[str, Any]]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield the canonical rows of a set; rows that cannot be converted are skipped."""
    for place, raw in rows:
        with contextlib.suppress(RowFault):
            yield place, normalise_for(alone, raw)[1]


def question_of(row: dict[str, Any], place: str) -> Question:
    """Convert a canonical row (see data/read/formats.py) to a question.

    Raises:
        RequestError: If the row consists of token ids.
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
        reply = messages[stop] if turns else None
        answer = reply.get("content") if reply is not None else None
        return Question(messages[:stop], shown, answer, row.get("tools"), row.get(VARIABLES), reply)
    if "prompt" in row:
        return Question(None, row["prompt"], row["completion"])
    if "text" in row:
        words = row["text"].split()
        half = max(1, min(16, len(words) // 2))
        return Question(None, " ".join(words[:half]), " ".join(words[half:]))
    raise RequestError.of(place, "contains token ids instead of text", "set prompt=… or prompts=FILE")
