"""Location of the assistant turns, as character spans, in a conversation rendered by any chat template.

The span of an assistant turn is found by prefix difference: render the messages before the turn with the generation
prompt, render the messages up to and including the turn, and take what the second text adds to the first. Some
templates render a turn differently when more messages follow (Qwen3 adds an empty thinking block only to the last
answer). Such a turn is located by the places of its texts (places.py) in both renderings. If neither works, the row
raises an error.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from ..read.faults import RowFault
from .places import Places, find_places
from .renderer import OWN_TEMPLATE, Message, Renderer, Span

ONE_ROW = f"set task.one_row_per_turn=true or task.train_on=last, or {OWN_TEMPLATE}"


class PromptFault(RowFault):
    """The generation prompt ends with text that the rendered answer does not start with."""


@dataclass(frozen=True)
class Closers:
    """Tokens that can end a turn: the added tokens of the tokenizer, including EOS."""

    tokens: tuple[str, ...]
    eos: str | None

    @property
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

    def first_end(self, text: str) -> int:
        """Return the length of the white space and end token at the start of the text, or 0 if there is none."""
        blank = len(text) - len(text.lstrip())
        token = max((token for token in self.ends if text.startswith(token, blank)), key=len, default="")
        return blank + len(token) if token else 0


def find_spans(
    render: Renderer, places: Places, turns: Sequence[int], closers: Closers, *, lenient: bool = False
) -> list[Span]:
    """Return the half-open character spans in the rendered text of the assistant turns with the indices `turns`.

    A span ends with the end token of the turn. Whitespace after it belongs to the template.

    Args:
        render: Renderer of the conversation.
        places: The rendered conversation.
        turns: Indices of assistant messages, in ascending order.
        closers: Tokens that can end a turn.
        lenient: Whether a turn may lack texts that are rendered when it is the last one.

    Raises:
        RowFault: The template does not render a turn in the way that the model would generate it.
    """
    return [_find_span(render, places, turn, closers, lenient=lenient) for turn in turns]


def find_content(places: Places, turn: int, closers: Closers) -> Span | None:
    """Return the span of a message of another role: its texts and the end token behind them, without its header."""
    found = places.within(turn)
    if not found:
        return None
    stop = found[-1][1]
    return found[0][0], stop + closers.first_end(places.text[stop:])


def render_around(render: Renderer, messages: Sequence[Message], turn: int) -> tuple[str, str]:
    """Return the prompt of a turn, and the conversation up to and including the turn, which starts with it.

    Raises:
        RowFault: The turn has no prompt, or the rendered turn does not start with it.
    """
    if turn == 0:
        raise RowFault("the conversation starts with an assistant turn", "start with a user turn, or drop these rows")
    before, after = render(messages[:turn], generation=True), render(messages[: turn + 1])
    if not after.startswith(before):
        tail = before[len(common_prefix(before, after)) :][-40:]
        cause = f"the chat template's generation prompt ends with {tail!r}, which the rendered answer does not contain"
        raise PromptFault(
            cause,
            "set task.chat_template_kwargs, or this column of the rows, to render the prompt without it (such as"
            " {enable_thinking: false} for answers without reasoning); if it opens a <think> block, task.reasoning=drop"
            " trains an empty one;"
            f" or {OWN_TEMPLATE}",
        )
    return before, after


def common_prefix(one: str, other: str) -> str:
    """Return the longest common prefix."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


def _find_span(render: Renderer, places: Places, turn: int, closers: Closers, *, lenient: bool) -> Span:
    text = places.text
    before, after = render_around(render, places.messages, turn)
    if text.startswith(after):
        start, stop = len(before), len(after)
    else:
        start, stop = _locate(render, places, turn, before, after, closers, lenient=lenient)
    words = max((place[1] for place in places.within(turn)), default=start)
    if closers.eos and closers.eos in text[words:stop]:
        stop = text.index(closers.eos, words) + len(closers.eos)  # what follows EOS opens the next turn
    behind = text[stop:].lstrip()
    kept = text[start:stop].rstrip()
    if closers.eos and not kept.endswith(closers.ends) and behind.startswith(closers.eos):
        stop = len(text) - len(behind) + len(closers.eos)  # some templates render the end token with the next turn
        kept = text[start:stop].rstrip()
    if kept.endswith(closers.tokens):
        return start, start + len(kept)
    if _opens_next(text[words:stop], before, closers):
        raise RowFault("the chat template opens another turn behind an answer, without an EOS between", OWN_TEMPLATE)
    return start, stop


def _opens_next(behind: str, before: str, closers: Closers) -> bool:
    """Return whether the text behind an answer has an end token and then ends as a prompt does."""
    ends = [behind.index(token) + len(token) for token in closers.ends if token in behind]
    rest = behind[min(ends) :].strip() if ends else ""
    return bool(rest) and before.rstrip().endswith(rest)


def _locate(
    render: Renderer, places: Places, turn: int, before: str, after: str, closers: Closers, *, lenient: bool
) -> Span:
    """Locate a turn that is rendered differently when it is not the last; its texts and end token must be equal."""
    text, messages = places.text, places.messages
    alone = find_places(render, messages[: turn + 1], after)
    here, there = places.within(turn), alone.within(turn)
    if bool(here) != bool(there) or not (here or text.startswith(before)):
        raise RowFault("the chat template does not render earlier assistant turns", ONE_ROW)
    first, last = (here[0][0], here[-1][1]) if here else (len(before), len(before))
    after_first, after_last = (there[0][0], there[-1][1]) if there else (len(before), len(before))
    closer = closers.trim(common_prefix(text[last:], after[after_last:]))
    start = len(before)
    if not text.startswith(before):  # the prompt has more than earlier turns, such as an empty thinking block
        lead = "" if before.startswith(text[:first]) else after[len(before) : after_first]
        start = first - len(lead)
        if text[start:first] != lead or not before.startswith(text[:start]):
            raise RowFault("the chat template renders earlier assistant turns unlike the last one", ONE_ROW)
    if not lenient and text[first:last].strip() != after[after_first:after_last].strip():
        cause = "the chat template changes the content of earlier assistant turns (for example, removes their thinking)"
        raise RowFault(cause, ONE_ROW)
    if not closer:
        raise RowFault("the chat template ends earlier assistant turns with other tokens than the last one", ONE_ROW)
    return start, last + len(closer)
