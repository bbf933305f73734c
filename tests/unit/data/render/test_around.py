"""Long conversations: the same tokens are learned as if each turn were rendered behind all that precedes it."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.render import supervised
from dist_ft.data.render.around import turns_of_whole
from dist_ft.data.render.template import ChatTokenizer
from tests.unit.data.render.chats import CHATML, make_tokenizer
from tests.unit.data.render.dialogues import RESULT, TOOLS, Message, called, said, user
from tests.unit.data.render.families import FAMILIES

FEW = 3


def chat(answers: int, **more: Any) -> list[Message]:
    """A conversation with this number of answers."""
    return [message for at in range(answers) for message in (user(2 * at % 40), said((2 * at + 1) % 40, **more))]


def loop(calls: int) -> list[Message]:
    """A task with this number of calls, each with its result, and the answer."""
    return [user(1), *(message for at in range(calls) for message in (called(12 + at % 20), RESULT)), said(2)]


CONVERSATIONS: dict[str, tuple[list[Message], Any]] = {
    "chat": (chat(FEW), None),
    "system": ([{"role": "system", "content": "be kind"}, *chat(FEW)], None),
    "empty": ([*chat(2), user(5), {"role": "assistant", "content": "ok"}, user(7), said(8)], None),
    "reasoning": ([*chat(FEW, weight=0, thinking="hm"), user(1), said(2, thinking="so")], None),
    "all_reasoning": (chat(FEW, thinking="hm"), None),
    "loop": (loop(FEW), TOOLS),
    "loops": ([*loop(1), *loop(2), *loop(1)], TOOLS),
    "long_loops": ([*loop(FEW), *loop(FEW)], TOOLS),
    "thinking_loop": ([user(1), *(m for at in range(4) for m in (called(at, thinking="hm"), RESULT)), said(2)], TOOLS),
    "two_calls": ([user(1), called(12, 13), RESULT, RESULT, called(14), RESULT, said(2), *chat(2)], TOOLS),
}


def outcome(tokenizer: Any, messages: list[Message], tools: Any) -> Any:
    """The encoded row, or why it is refused."""
    try:
        return ChatTokenizer(tokenizer).encode_messages(messages, tools)
    except RowFault as fault:
        return fault.cause


@pytest.mark.parametrize("family", FAMILIES)
def test_near_messages_say_the_same_of_a_turn(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = FAMILIES[family].tokenizer()
    monkeypatch.setattr(supervised, "turns_of_whole", lambda turns: turns)
    expected = {name: outcome(tokenizer, *given) for name, given in CONVERSATIONS.items()}
    monkeypatch.setattr(supervised, "turns_of_whole", lambda turns: ())
    assert {name: outcome(tokenizer, *given) for name, given in CONVERSATIONS.items()} == expected


def test_a_turn_at_which_near_messages_differ_is_rendered_behind_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each header has a number, which depends on all that precedes it."""
    template = CHATML.replace("<|im_start|>{{ m.role }}", "<|im_start|>{{ loop.index }} {{ m.role }}").replace(
        "<|im_start|>assistant", "<|im_start|>{{ messages | length + 1 }} assistant"
    )
    tokenizer, messages = make_tokenizer(template), chat(FEW)
    expected = ChatTokenizer(tokenizer).encode_messages(messages)
    monkeypatch.setattr(supervised, "turns_of_whole", lambda turns: ())
    assert ChatTokenizer(tokenizer).encode_messages(messages) == expected


def test_of_a_long_conversation_some_turns_are_rendered_behind_all() -> None:
    assert list(turns_of_whole(range(1, 16, 2))) == list(range(1, 16, 2))
    many = sorted(turns_of_whole(range(1, 200, 2)))
    assert many == [1, 3, 5, 7, 9, 11, 13, 15, 31, 63, 127, 199]


@pytest.mark.parametrize("family", ["chatml", "last_thought", "marked"])
@pytest.mark.parametrize("make", [chat, loop])
def test_the_cost_is_linear_in_turns(family: str, make: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Twice the turns render at most 2.2 times the messages."""
    from transformers.utils import chat_template_utils

    tokenizer, counts = FAMILIES[family].tokenizer(), []
    plain = chat_template_utils.render_jinja_template

    def counted(conversations: Any, *given: Any, **options: Any) -> Any:
        counts[-1] += sum(map(len, conversations))
        return plain(conversations, *given, **options)

    monkeypatch.setattr(chat_template_utils, "render_jinja_template", counted)
    monkeypatch.setattr("transformers.tokenization_utils_base.render_jinja_template", counted)
    for answers in (32, 64):
        counts.append(0)
        ChatTokenizer(tokenizer).encode_messages(make(answers), TOOLS if make is loop else None)
    assert 0 < counts[1] < 2.2 * counts[0]
