"""Which messages of a conversation are supervised."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from ...config.task import Reasoning
from ..read.faults import RowFault
from ..read.messages import FLAGS
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


def _flag(name: str, value: Any) -> bool:
    if value in (0, 1):  # also true and false, and 0.0 and 1.0
        return bool(value)
    raise RowFault(f"the {name} of a message is {value!r:.20}, neither 0 nor 1", "set it to 0 or 1")


def _last_answer(messages: Sequence[Message]) -> int:
    return max((i for i, message in enumerate(messages) if message["role"] == "assistant"), default=-1)
