"""A chat: what is left out of a conversation that is too long, and lines that cannot be answered."""

from __future__ import annotations

import io
from collections.abc import Callable

import pytest
from rich.console import Console

from dist_ft.assess.chat import chat_loop
from dist_ft.assess.turns import Question
from dist_ft.errors import RequestError


class Parrot:
    """Speaker that repeats the last message, and takes at most `limit` messages and no message `bad`."""

    name = "tuned"

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.asked: list[list[str]] = []

    def fits(self, question: Question) -> bool:
        return len(question.messages or []) <= self.limit

    def answer(self, question: Question, show: Callable[[str], object]) -> str:
        contents = [str(message["content"]) for message in question.messages or []] or [question.text]
        if contents[-1] == "bad" or not self.fits(question):
            raise RequestError.of("prompt", "is too long", "shorten it")
        self.asked.append(contents)
        show(contents[-1])
        show("!")
        return contents[-1] + "!"


def talk(monkeypatch: pytest.MonkeyPatch, limit: int, lines: str, *, chat: bool = True, system: str | None = None):
    speaker, out = Parrot(limit), io.StringIO()
    monkeypatch.setattr("sys.stdin", io.StringIO(lines))
    chat_loop([speaker], chat=chat, system=system, console=Console(file=out, width=200))
    return speaker.asked, out.getvalue().splitlines()


def test_the_oldest_turns_are_left_out_but_not_the_system_message(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown = talk(monkeypatch, 4, "a\nb\nc\nd\n", system="s")
    assert asked == [["s", "a"], ["s", "a", "a!", "b"], ["s", "b", "b!", "c"], ["s", "c", "c!", "d"]]
    assert shown == [
        "tuned: a!",
        "tuned: b!",
        "(the oldest turn is left out: the model's limit is 4 tokens)",
        "tuned: c!",
        "(the oldest turn is left out: the model's limit is 4 tokens)",
        "tuned: d!",
    ]


def test_a_line_that_cannot_be_answered_does_not_end_the_chat(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, shown = talk(monkeypatch, 9, "a\nbad\nb\nclear\nc\n")
    assert asked == [["a"], ["a", "a!", "b"], ["c"]]
    assert any("is too long" in line for line in shown)
    asked, shown = talk(monkeypatch, 0, "a\n")
    assert asked == []


def test_lines_without_a_template_are_completed_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, _ = talk(monkeypatch, 9, "a\nb\nexit\nc\n", chat=False)
    assert asked == [["a"], ["b"]]
