"""Location of the assistant turns, as character spans, in a conversation rendered by any chat template.

The span of an assistant turn is found by prefix difference: render the messages before the turn with the generation
prompt, render the messages up to and including the turn, and take what the second text adds to the first. Some
templates render a turn differently when more messages follow (Qwen3 adds an empty thinking block only to the last
answer). Such a turn is located by the places of its texts (places.py) in both renderings. If neither works, the row
raises an error.
"""

from __future__ import annotations

import contextlib
import re
from dataclasses import dataclass
from functools import cached_property

from ..read.faults import RowFault
from .around import Around, behind_all, behind_near
from .places import Places
from .renderer import OWN_TEMPLATE, Renderer, Span, common_prefix

_VISIBLE = re.compile(r"\S")
ONE_ROW = f"set task.one_row_per_turn=true or task.train_on=last, or {OWN_TEMPLATE}"


@dataclass(frozen=True)
class Closers:
    """Tokens that can end a turn: the added tokens of the tokenizer, including EOS."""

    tokens: tuple[str, ...]
    eos: str | None

    @cached_property
    def ends(self) -> tuple[str, ...]:
        """The tokens without closing tags: `</tool_call>` ends a call, not the turn."""
        tags = {token for token in self.tokens if token[1:2] == "/" and token[0] + token[2:] in self.tokens}
        return tuple(token for token in self.tokens if token == self.eos or token not in tags)

    def trim(self, text: str) -> str:
        """Return the text up to and including the last of the tokens, or an empty string if there is none."""
        return text[: max((text.rfind(token) + len(token) for token in self.tokens if token in text), default=0)]

    def without(self, text: str) -> str:
        """Return the text without the end tokens at its end, and the white space between and after them."""
        while token := next((token for token in self.ends if text.rstrip().endswith(token)), None):
            text = text.rstrip()[: -len(token)]
        return text

    def first_end(self, text: str, position: int) -> int:
        """Return the length of the white space and end token at this position of the text, or 0 without one."""
        behind = _behind_blanks(text, position)
        token = max((token for token in self.ends if text.startswith(token, behind)), key=len, default="")
        return behind - position + len(token) if token else 0


def find_span(
    render: Renderer, places: Places, turn: int, closers: Closers, *, near: bool = False, lenient: bool = False
) -> Span:
    """Return the half-open character span in the rendered text of an assistant turn.

    A span ends with the end token of the turn. Whitespace after it belongs to the template.

    Args:
        render: Renderer of the conversation.
        places: The rendered conversation.
        turn: Index of the assistant message.
        closers: Tokens that can end a turn.
        near: Whether the turn may be rendered behind the messages close to it alone (around.py).
        lenient: Whether a turn may lack texts that are rendered when it is the last one.

    Raises:
        RowFault: The template does not render a turn in the way that the model would generate it.
    """
    if near and (around := behind_near(render, places, turn)) is not None:
        with contextlib.suppress(RowFault):
            return _find_span(around, places, turn, closers, lenient=lenient)
    return _find_span(behind_all(render, places, turn), places, turn, closers, lenient=lenient)


def find_content(places: Places, turn: int, closers: Closers) -> Span | None:
    """Return the span of a message of another role: its texts and the end token behind them, without its header."""
    found = places.within(turn)
    if not found:
        return None
    stop = found[-1][1]
    return found[0][0], stop + closers.first_end(places.text, stop)


def _find_span(around: Around, places: Places, turn: int, closers: Closers, *, lenient: bool) -> Span:
    text = places.text
    if text.startswith(around.after, around.base):
        start, stop = around.base + len(around.before), around.base + len(around.after)
    else:
        start, stop = _locate(around, places, turn, closers, lenient=lenient)
    words = max((place[1] for place in places.within(turn)), default=start)
    if closers.eos and closers.eos in text[words:stop]:
        stop = text.index(closers.eos, words) + len(closers.eos)  # what follows EOS opens the next turn
    kept = text[start:stop].rstrip()
    behind = _behind_blanks(text, stop)
    if closers.eos and not kept.endswith(closers.ends) and text.startswith(closers.eos, behind):
        stop = behind + len(closers.eos)  # some templates render the end token with the next turn
        kept = text[start:stop].rstrip()
    if kept.endswith(closers.tokens):
        return start, start + len(kept)
    if _opens_next(text[words:stop], around.before, closers):
        raise RowFault("the chat template opens another turn behind an answer, without an EOS between", OWN_TEMPLATE)
    return start, stop


def _opens_next(behind: str, before: str, closers: Closers) -> bool:
    """Return whether the text behind an answer has an end token and then ends as a prompt does."""
    ends = [behind.index(token) + len(token) for token in closers.ends if token in behind]
    rest = behind[min(ends) :].strip() if ends else ""
    return bool(rest) and before.rstrip().endswith(rest)


def _locate(around: Around, places: Places, turn: int, closers: Closers, *, lenient: bool) -> Span:
    """Locate a turn that is rendered differently when it is not the last; its texts and end token must be equal."""
    text, base, before, after = places.text, around.base, around.before, around.after
    here, there = places.within(turn), around.within()
    if bool(here) != bool(there) or not (here or text.startswith(before, base)):
        raise RowFault("the chat template does not render earlier assistant turns", ONE_ROW)
    start = base + len(before)
    first, last = (here[0][0], here[-1][1]) if here else (start, start)
    after_first, after_last = (there[0][0], there[-1][1]) if there else (len(before), len(before))
    closer = closers.trim(common_prefix(text[last : last + len(after) - after_last], after[after_last:]))
    if not text.startswith(before, base):  # the prompt has more than earlier turns, such as an empty thinking block
        lead = "" if before.startswith(text[base:first]) else after[len(before) : after_first]
        start = first - len(lead)
        if text[start:first] != lead or not before.startswith(text[base:start]):
            raise RowFault("the chat template renders earlier assistant turns unlike the last one", ONE_ROW)
    if not lenient and text[first:last].strip() != after[after_first:after_last].strip():
        cause = "the chat template changes the content of earlier assistant turns (for example, removes their thinking)"
        raise RowFault(cause, ONE_ROW)
    if not closer:
        raise RowFault("the chat template ends earlier assistant turns with other tokens than the last one", ONE_ROW)
    return start, last + len(closer)


def _behind_blanks(text: str, position: int) -> int:
    """Return the position of the next character that is no white space."""
    found = _VISIBLE.search(text, position)
    return found.start() if found else len(text)
