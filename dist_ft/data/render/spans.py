"""Which characters of a rendered conversation the model itself would have written, for any chat template.

By prefix difference: an assistant turn is what the template renders for the messages up to and with it, beyond what it
renders for those before it with the generation prompt. A template may show an earlier turn otherwise once more
messages follow (Qwen3 wraps only the last answer in an empty thinking block); then the turn is located by rendering
the conversation twice, once with a mark in place of its content. Where neither holds the row is refused.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..read.faults import RowFault

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue0f0\ue0f1\ue0f2"  # private use: in no text, and no template strips it


class Render(Protocol):
    """A chat template applied to messages."""

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str: ...


@dataclass(frozen=True)
class Closers:
    """Tokens that may end a turn: the tokenizer's added ones, EOS among them."""

    tokens: tuple[str, ...]
    eos: str | None

    def closes(self, text: str) -> bool:
        """Whether the text ends with one of them."""
        return text.endswith(self.tokens)

    def trim(self, text: str) -> str:
        """The text up to its last such token; empty without one."""
        return text[: max((text.rfind(token) + len(token) for token in self.tokens if token in text), default=0)]

    def without(self, text: str) -> str:
        """The text without those at its end."""
        while token := next((token for token in self.tokens if text.endswith(token)), None):
            text = text[: -len(token)].rstrip()
        return text


OWN_TEMPLATE = "set task.chat_template to a Jinja file that renders each turn alike wherever it stands, or to chatml"


def find_spans(render: Render, messages: Sequence[Message], turns: Collection[int], closers: Closers) -> list[Span]:
    """The half-open character ranges, in `render(messages)`, of the assistant turns numbered `turns`.

    A range has the turn's end token in it and ends there: white space behind it belongs to the template.

    Raises:
        RowFault: the template does not show a turn as the model would have to write it.
    """
    text = render(messages)
    return [_find_span(render, messages, turn, text, closers) for turn in sorted(turns)]


def _find_span(render: Render, messages: Sequence[Message], turn: int, text: str, closers: Closers) -> Span:
    if turn == 0:
        raise RowFault("the conversation starts with an assistant turn", "begin it with a user's, or drop these rows")
    before, after = render(messages[:turn], generation=True), render(messages[: turn + 1])
    if not after.startswith(before):
        tail = before[max(0, len(_common(before, after)) - 24) :]
        cause = f"the chat template's generation prompt ends in {tail!r}, which it does not show in the answer"
        raise RowFault(cause, f"write that into the data, or {OWN_TEMPLATE}")
    if text.startswith(after):
        start, stop = len(before), len(after)
    else:
        start, stop = _locate(render, messages, turn, before, after, text, closers)
    behind = text[stop:].lstrip()
    if closers.eos and not closers.closes(text[start:stop].rstrip()) and behind.startswith(closers.eos):
        stop = len(text) - len(behind) + len(closers.eos)  # the end token came with what follows the turn
    kept = text[start:stop].rstrip()
    if closers.closes(kept):
        stop = start + len(kept)
    if messages[turn]["content"].strip() and not closers.without(kept).strip():
        raise RowFault("the chat template does not show the assistant's words", OWN_TEMPLATE)
    if any(call["function"]["name"] not in kept for call in messages[turn].get("tool_calls") or ()):
        way_out = "set task.chat_template to one that renders tool calls, such as chatml"
        raise RowFault("the chat template does not render tool calls", way_out)
    return start, stop


def _locate(
    render: Render, messages: Sequence[Message], turn: int, before: str, after: str, text: str, closers: Closers
) -> Span:
    """Where a turn stands that is shown otherwise than when it was the last; its words and end must be the same."""
    marked = {"role": "assistant", "content": MARK}
    first, last = _region(text, render([*messages[:turn], marked, *messages[turn + 1 :]]))
    after_first, after_last = _region(after, render([*messages[:turn], marked]))
    closer = closers.trim(_common(text[last:], after[after_last:]))
    start = len(before) if text.startswith(before) else first
    if text[first:last].strip() != after[after_first:after_last].strip() or not before.startswith(text[:start]):
        cause = "the chat template rewrites earlier assistant turns (such as dropping their thinking)"
        raise RowFault(cause, f"end a row with the turn to learn, or {OWN_TEMPLATE}")
    if not closer:
        cause = "the chat template ends earlier assistant turns otherwise than the last"
        raise RowFault(cause, f"end a row with the turn to learn, or {OWN_TEMPLATE}")
    return start, last + len(closer)


def _region(text: str, marked: str) -> Span:
    """The part of `text` that the mark stands for in `marked`."""
    at = marked.find(MARK)
    if at < 0:
        raise RowFault("the chat template does not show the assistant's words", OWN_TEMPLATE)
    tail = len(marked) - at - len(MARK)
    stop = len(text) - tail
    if text[:at] == marked[:at] and stop >= at and text[stop:] == marked[at + len(MARK) :]:
        return at, stop
    # what surrounds the content depends on it: take all that differs
    first = len(_common(text, marked))
    same = len(_common(text[first:][::-1], marked[first:][::-1]))
    return first, len(text) - same


def _common(one: str, other: str) -> str:
    """The longest text with which both begin."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
