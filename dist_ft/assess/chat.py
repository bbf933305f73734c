"""A chat with the models of a run, line by line."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from ..errors import RequestError
from .speaker import STYLES, Speaker
from .turns import Question


def chat_loop(speakers: Sequence[Speaker], *, chat: bool, system: str | None, console: Console) -> None:
    """Answer lines of standard input until `exit` or end of file; each model keeps its own conversation history.

    Args:
        speakers: models that answer.
        chat: whether lines are user messages; otherwise each is a text that is completed.
        system: system message that begins each conversation.
        console: where answers are shown.
    """
    begin: list[dict[str, Any]] = [] if system is None else [{"role": "system", "content": system}]
    histories = {speaker.name: begin for speaker in speakers}
    if sys.stdin.isatty():
        console.print("type `exit` to quit, `clear` to reset the conversation", style="dim")
    for line in read_lines():
        if line == "clear":
            histories = dict.fromkeys(histories, begin)
            continue
        for speaker in speakers:
            said = [*histories[speaker.name], {"role": "user", "content": line}]
            try:
                if chat:
                    said = shorten(speaker, said, len(begin), console)
                text = _answer(speaker, Question(said, line) if chat else Question(None, line), console)
            except RequestError as error:  # of this line; the conversation goes on without it
                console.print(f"{error}", style="red", markup=False)
                continue
            if chat:
                histories[speaker.name] = [*said, {"role": "assistant", "content": text}]


def shorten(speaker: Speaker, said: list[dict[str, Any]], kept: int, console: Console) -> list[dict[str, Any]]:
    """Return a conversation without its oldest turns, as far as it must be shortened to fit into the model.

    Args:
        speaker: model that answers.
        said: messages, the last one from the user.
        kept: number of messages at the start that are never left out.
        console: where it is shown what was left out.
    """
    dropped = 0
    while len(said) > kept + 1 and not speaker.fits(Question(said, "")):
        said = [*said[:kept], *said[kept + 2 :]]  # a message of the user and its answer
        dropped += 1
    if dropped:
        turns = "turn is" if dropped == 1 else f"{dropped} turns are"
        console.print(f"(the oldest {turns} left out: the model's limit is {speaker.limit} tokens)", style="dim")
    return said


def read_lines() -> Iterator[str]:
    """Yield the non-blank lines of standard input until `exit`, `quit` or end of file; a terminal can edit them."""
    if sys.stdin.isatty():
        with contextlib.suppress(ImportError):  # missing where Python was built without it
            import readline  # noqa: F401 – input() then has a history and the keys of the shell
    while (line := _read_line()) not in (None, "exit", "quit"):
        if line:
            yield line


def _read_line() -> str | None:
    try:
        return input("you: " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None


def _answer(speaker: Speaker, question: Question, console: Console) -> str:
    """Show an answer while it is generated, and return it."""
    style = STYLES.get(speaker.name, "")
    console.print(Text(f"{speaker.name}: ", style="bold"), end="")

    def show(piece: str) -> None:
        console.print(Text(piece, style=style), end="", soft_wrap=True)
        console.file.flush()

    try:
        return speaker.answer(question, show)
    finally:
        console.print()
