"""Supervised characters of a rendered conversation: which turns, with which end tokens, and proof of their texts."""

from __future__ import annotations

import bisect
import re
from collections.abc import Collection, Sequence

from ..read.faults import RowFault
from .around import behind_all, behind_near, turns_of_whole
from .places import Places, find_places
from .renderer import OWN_TEMPLATE, Message, Renderer, Span, common_prefix
from .spans import Closers, find_content, find_span
from .turns import Supervision

PLAIN = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]


def supervised_spans(
    render: Renderer,
    messages: Sequence[Message],
    turns: Sequence[int],
    muted: Collection[int],
    reasoned: Collection[int],
    closers: Closers,
    settings: Supervision,
) -> tuple[str, list[Span]]:
    """Return the rendered text and the half-open spans of its supervised characters.

    Args:
        render: Renderer with the tools of the row.
        messages: Messages without their flags.
        turns: Indices of the supervised messages.
        muted: Indices of the messages that are flagged as not supervised.
        reasoned: Indices of the messages whose reasoning has to be rendered.
        closers: Tokens that can end a turn.
        settings: What is supervised.

    Raises:
        RowFault: A text of the conversation is not rendered, or not where a turn is generated.
    """
    text, blocks = render.with_blocks(messages)
    places = find_places(render, messages, text, blocks)
    places.require(reasoned)
    if settings.train_on == "all":
        return text, _outside(text.rstrip(), [span for i in muted for span in places.within(i)])
    answers = [turn for turn in turns if messages[turn]["role"] == "assistant"]
    spans = _answers(render, places, answers, closers, lenient=settings.reasoning == "keep")
    for turn in turns:
        if turn not in spans:
            content = find_content(places, turn, closers)
            spans[turn] = [] if content is None else [content]
        places.require_inside(turn, spans[turn], reasoned)
        if closers.eos and any(_ends_early(places, turn, span, closers.eos) for span in spans[turn]):
            raise RowFault("the chat template renders an EOS inside an answer, where generation stops", OWN_TEMPLATE)
    for turn in spans:
        if settings.train_on_eos == "none" or (settings.train_on_eos == "last" and turn != turns[-1]):
            spans[turn] = _without_end(text, spans[turn], closers)
    return text, [span for turn in sorted(spans) for span in spans[turn]]


def ends_plain_turns(render: Renderer, closers: Closers) -> bool:
    """Return whether a plain answer at the end has an end token; also true if the template cannot render one."""
    try:
        text = render.with_tools(PLAIN, None)
        return text.rstrip().endswith(closers.ends)
    except RowFault:
        return True


def _answers(
    render: Renderer, places: Places, turns: Sequence[int], closers: Closers, *, lenient: bool
) -> dict[int, list[Span]]:
    """Return the spans of each assistant turn: the template's `{% generation %}` blocks, or the prefix difference."""
    blocks, whole = places.blocks, turns_of_whole(turns)
    if not blocks:
        return {
            turn: [find_span(render, places, turn, closers, near=turn not in whole, lenient=lenient)] for turn in turns
        }
    spans: dict[int, list[Span]] = {turn: [] for turn in turns}
    borders = sorted((found[-1][1], i) for i in range(len(places.messages)) if (found := places.within(i)))
    for start, stop in blocks:
        behind = bisect.bisect_right(borders, (start, len(places.messages)))
        here = [i for _, i in borders[max(0, behind - 1) : behind + 1] if places.messages[i]["role"] == "assistant"]
        owner = here[-1] if here else None  # behind the texts of a turn only what ends it, such as an end token
        if owner in spans:
            kept = places.text[start:stop].rstrip()
            spans[owner].append((start, start + len(kept) if kept.endswith(closers.ends) else stop))
    for turn, found in spans.items():
        if found:
            found[0] = _behind_prompt(render, places, turn, found[0], near=turn not in whole)
            found[-1] = _to_end(render, places, turn, found[-1], closers, near=turn not in whole)
    return spans


def _behind_prompt(render: Renderer, places: Places, turn: int, block: Span, *, near: bool) -> Span:
    """Return a turn's first block without what the generation prompt contains of it, such as the header of the turn."""
    around = behind_near(render, places, turn) if near else None
    around = around or behind_all(render, places, turn)
    blocks = around.blocks or []
    begin = next((start for start, stop in blocks if stop > len(around.prompt)), len(around.prompt))
    header = common_prefix(around.rendered[begin : len(around.prompt)], places.text[block[0] : block[1]])
    return block[0] + len(header), block[1]


def _to_end(render: Renderer, places: Places, turn: int, block: Span, closers: Closers, *, near: bool) -> Span:
    """Return a turn's last block up to its end token, which some templates leave out, without white space behind it."""
    start, stop = block
    kept = places.text[start:stop].rstrip()
    if kept.endswith(closers.ends):
        return start, start + len(kept)
    end = max((token for token in closers.ends if places.text.startswith(token, stop)), key=len, default="")
    if not end:
        return block
    try:
        whole = find_span(render, places, turn, closers, near=near)[1]
    except RowFault:
        whole = stop + len(end) if end == closers.eos else stop
    return start, min(max(whole, stop), stop + len(end))


def _ends_early(places: Places, turn: int, span: Span, eos: str) -> bool:
    """Return whether a turn has EOS before one of its texts, and not in a text."""
    start, stop = span
    texts = places.within(turn)
    last = max((first for first, _ in texts), default=start)
    if places.text.find(eos, start, min(last, stop)) < 0:
        return False
    found = (at.start() for at in re.compile(re.escape(eos)).finditer(places.text, start, min(last, stop)))
    return any(not any(first <= at < end for first, end in texts) for at in found)


def _without_end(text: str, spans: Sequence[Span], closers: Closers) -> list[Span]:
    if not spans:
        return []
    *first, (start, stop) = spans
    return [*first, (start, start + len(closers.without(text[start:stop])))]


def _outside(text: str, muted: Sequence[Span]) -> list[Span]:
    """Return the spans of the text outside the given ones."""
    edges = [0, *(edge for span in sorted(muted) for edge in span), len(text)]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]
