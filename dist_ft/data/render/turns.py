"""Which messages of a conversation are supervised, and the forms in which a row's reasoning is given to a template."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...config.task import Reasoning
from ..read.faults import RowFault
from ..read.messages import FLAGS
from .parts import PROTECTED, REASONING_KEYS, THOUGHT
from .renderer import Message

Ends = Literal["turn", "last", "none"]


@dataclass(frozen=True)
class Supervision:
    """What is learned of a conversation; the keys of the same names of `task`."""

    train_on: str | Sequence[str] = "assistant"
    train_on_eos: Ends = "turn"
    reasoning: Reasoning = "require"

    @classmethod
    def of(cls, task: Any) -> Supervision:
        """Return the settings of a task's configuration; those that the task does not have are the defaults."""
        names = ("train_on", "train_on_eos", "reasoning")
        return cls(**{name: getattr(task, name) for name in names if hasattr(task, name)})

    @property
    def roles(self) -> tuple[str, ...]:
        """Roles whose messages are supervised unless they say otherwise."""
        if isinstance(self.train_on, str):
            return ("assistant",)
        return tuple(self.train_on)

    def choose(self, messages: Sequence[Message], context: int = 0) -> list[int]:
        """Return the indices of the supervised messages, of which none is among the first `context` ones.

        A flag of a message takes precedence over `train_on`.

        Raises:
            RowFault: A flag is neither true nor false, or no message is supervised.
        """
        flags = [flag_of(message) for message in messages]
        roles = self.roles
        chosen = [
            i
            for i, (message, flag) in enumerate(zip(messages, flags, strict=True))
            if i >= context and (message["role"] in roles if flag is None else flag)
        ]
        if self.train_on == "last":
            last = _last_answer(messages)
            chosen = [i for i in chosen if messages[i]["role"] != "assistant" or i == last]
        if not chosen:
            turns = [message for message in messages[context:] if message["role"] in roles]
            cause = f"there is no {' or '.join(roles)} turn" if not turns else "no turn is marked for training"
            raise RowFault(cause, "correct data.format or the roles, or set task.unsupervised=drop")
        if not any(messages[i]["content"].strip() or messages[i].get("tool_calls") for i in chosen):
            raise RowFault(
                f"the {' or '.join(roles)} turns are empty", "correct their content, or set task.unsupervised=drop"
            )
        return chosen


def flag_of(message: Message) -> bool | None:
    """Return whether a message says that it is supervised, or None if it does not say.

    Raises:
        RowFault: Its flag is neither true nor false, or its flags differ.
    """
    values = {_flag(name, message[name]) for name in FLAGS if message.get(name) is not None}
    if len(values) > 1:
        raise RowFault(f"the {', '.join(FLAGS)} of a message differ", "keep one of them")
    return values.pop() if values else None


def without_flags(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without their flags, which are not for the chat template."""
    return [{key: value for key, value in message.items() if key not in FLAGS} for message in messages]


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without reasoning, in keys of its own or in `<think>` tags at the start of the content."""
    kept = [{key: value for key, value in message.items() if key not in REASONING_KEYS} for message in messages]
    return [
        {**message, "content": THOUGHT.sub("", message["content"])} if message["role"] == "assistant" else message
        for message in kept
    ]


def reasoning_forms(messages: Sequence[Message], template: str) -> Iterator[list[Message]]:
    """Yield the conversation with its reasoning as given, then in the other forms that the chat template names.

    transformers gives reasoning to templates as `reasoning_content` and `thinking`. Others read `reasoning`, or a
    `<think>` block at the start of the content.
    """
    given = list(messages)
    yield given
    keyed = [_keyed(message) for message in messages]
    if keyed != given and "reasoning_content" in template:
        yield keyed
    if any("reasoning_content" in message for message in keyed):
        if "reasoning" in template:
            yield [_renamed(message) for message in keyed]
        if "</think>" in template:
            yield [_inline(message) for message in keyed]


def with_text_arguments(messages: Sequence[Message]) -> list[Message] | None:
    """Return the messages with the arguments of calls as JSON text, which some templates need; None without calls."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    changed = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def protected_form(messages: Sequence[Message], prompt: str, *, empty: bool) -> list[Message] | None:
    """Return the conversation with the reasoning of its last answer in a block that the template cannot cut away.

    Some templates open a `<think>` block in the generation prompt and cut what is in such a block out of all answers
    (DeepSeek-R1, QwQ), also out of the last one. Here PROTECTED stands for `</think>`; the renderer restores it.

    Args:
        messages: The conversation.
        prompt: The rendered prompt of the last message.
        empty: Whether an answer without reasoning gets an empty block.

    Returns:
        None if the prompt opens no block, or there is no reasoning.
    """
    opening = re.search(r"<think>(\s*)$", prompt)
    last = _keyed(messages[-1])
    thought = str(last.pop("reasoning_content", "")).strip()
    if opening is None or not (thought or empty) or any(PROTECTED in str(m) for m in messages):
        return None
    blank = opening[1]
    block = f"<think>{blank}{thought}{blank}{PROTECTED}{blank * 2}"
    return [*messages[:-1], {**last, "content": block + last["content"]}]


def _keyed(message: Message) -> Message:
    """Return the message with its reasoning as `reasoning_content` alone."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    thought = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if thought is None and (match := THOUGHT.match(message["content"])):
        thought, rest["content"] = match[1].strip(), message["content"][match.end() :]
    return {**rest, "reasoning_content": thought} if thought else rest


def _renamed(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "reasoning": message["reasoning_content"]} if "reasoning_content" in message else rest


def _inline(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def _flag(name: str, value: Any) -> bool:
    if value in (0, 1):  # also true and false, and 0.0 and 1.0
        return bool(value)
    raise RowFault(f"the {name} of a message is {value!r:.20}, neither 0 nor 1", "set it to 0 or 1")


def _last_answer(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
