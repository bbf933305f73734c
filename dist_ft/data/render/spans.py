"""Location of the assistant turns, as character spans, in a conversation rendered by any chat template.

The span of an assistant turn is found by prefix difference: render the messages before the turn with the generation
prompt, render the messages up to and including the turn, and take what the second text adds to the first. Some
templates render a turn differently when more messages follow (Qwen3 adds an empty thinking block only to the last
answer). Such a turn is located by rendering the conversation again with a marker as its content. If neither works, the
row raises an error.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from ..read.faults import RowFault

Message = dict[str, Any]
Span = tuple[int, int]
MARK = "\ue0f0\ue0f1\ue0f2"  # private-use characters, which no text contains and no template strips


class Render(Protocol):
    """Function that renders messages with a chat template."""

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str: ...


@dataclass(frozen=True)
class Closers:
    """Tokens that can end a turn: the added tokens of the tokenizer, including EOS."""

    tokens: tuple[str, ...]
    eos: str | None

    def closes(self, text: str) -> bool:
        """Return whether the text ends with one of the tokens."""
        return text.endswith(self.tokens)

    def trim(self, text: str) -> str:
        """Return the text up to and including the last of the tokens, or an empty string if there is none."""
        return text[: max((text.rfind(token) + len(token) for token in self.tokens if token in text), default=0)]

    def without(self, text: str) -> str:
        """Return the text without the tokens at its end."""
        while token := next((token for token in self.tokens if text.endswith(token)), None):
            text = text[: -len(token)].rstrip()
        return text


OWN_TEMPLATE = "set task.chat_template to chatml, or to a Jinja file that renders a turn the same at any position"


def find_spans(render: Render, messages: Sequence[Message], turns: Collection[int], closers: Closers) -> list[Span]:
    """Return the half-open character spans in `render(messages)` of the assistant turns with the indices `turns`.

    A span ends with the end token of the turn. Whitespace after it belongs to the template.

    Raises:
        RowFault: The template does not render a turn in the way that the model would generate it.
    """
    text = render(messages)
    return [_find_span(render, messages, turn, text, closers) for turn in sorted(turns)]


def _find_span(render: Render, messages: Sequence[Message], turn: int, text: str, closers: Closers) -> Span:
    if turn == 0:
        raise RowFault("the conversation starts with an assistant turn", "start with a user turn, or drop these rows")
    before, after = render(messages[:turn], generation=True), render(messages[: turn + 1])
    if not after.startswith(before):
        tail = before[max(0, len(_common(before, after)) - 24) :]
        cause = f"the chat template's generation prompt ends with {tail!r}, which the rendered answer does not contain"
        raise RowFault(cause, f"add this text to the data, or {OWN_TEMPLATE}")
    if text.startswith(after):
        start, stop = len(before), len(after)
    else:
        start, stop = _locate(render, messages, turn, before, after, text, closers)
    behind = text[stop:].lstrip()
    if closers.eos and not closers.closes(text[start:stop].rstrip()) and behind.startswith(closers.eos):
        stop = len(text) - len(behind) + len(closers.eos)  # some templates render the end token with the next turn
    kept = text[start:stop].rstrip()
    if closers.closes(kept):
        stop = start + len(kept)
    if messages[turn]["content"].strip() and not closers.without(kept).strip():
        raise RowFault("the chat template does not render the assistant's content", OWN_TEMPLATE)
    if any(call["function"]["name"] not in kept for call in messages[turn].get("tool_calls") or ()):
        way_out = "set task.chat_template to one that renders tool calls, such as chatml"
        raise RowFault("the chat template does not render tool calls", way_out)
    return start, stop


def _locate(
    render: Render, messages: Sequence[Message], turn: int, before: str, after: str, text: str, closers: Closers
) -> Span:
    """Locate a turn that is rendered differently when it is not the last; its content and end token must be equal."""
    marked = {"role": "assistant", "content": MARK}
    first, last = _region(text, render([*messages[:turn], marked, *messages[turn + 1 :]]))
    after_first, after_last = _region(after, render([*messages[:turn], marked]))
    closer = closers.trim(_common(text[last:], after[after_last:]))
    start = len(before) if text.startswith(before) else first
    if text[first:last].strip() != after[after_first:after_last].strip() or not before.startswith(text[:start]):
        cause = "the chat template changes the content of earlier assistant turns (for example, removes their thinking)"
        raise RowFault(cause, f"end each row with the turn to train on, or {OWN_TEMPLATE}")
    if not closer:
        cause = "the chat template ends earlier assistant turns with other tokens than the last one"
        raise RowFault(cause, f"end each row with the turn to train on, or {OWN_TEMPLATE}")
    return start, last + len(closer)


def _region(text: str, marked: str) -> Span:
    """Return the span of `text` that is replaced by the marker in `marked`."""
    at = marked.find(MARK)
    if at < 0:
        raise RowFault("the chat template does not render the assistant's content", OWN_TEMPLATE)
    tail = len(marked) - at - len(MARK)
    stop = len(text) - tail
    if text[:at] == marked[:at] and stop >= at and text[stop:] == marked[at + len(MARK) :]:
        return at, stop
    # The text around the content depends on the content, so take everything that differs.
    first = len(_common(text, marked))
    same = len(_common(text[first:][::-1], marked[first:][::-1]))
    return first, len(text) - same


def _common(one: str, other: str) -> str:
    """Return the longest common prefix."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]
