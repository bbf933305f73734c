"""Supervised characters of a rendered conversation: which turns, with which end tokens, and proof of their texts."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from ..read.faults import RowFault
from .places import Places, find_places
from .renderer import Message, Renderer, Span
from .spans import Closers, common_prefix, find_content, find_spans, render_around
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
    text = render(messages)
    places = find_places(render, messages, text)
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
    blocks = render.generated(places.messages)
    if not blocks:
        found = find_spans(render, places, turns, closers, lenient=lenient)
        return {turn: [span] for turn, span in zip(turns, found, strict=True)}
    spans: dict[int, list[Span]] = {turn: [] for turn in turns}
    borders = [(found[-1][1], i) for i in range(len(places.messages)) if (found := places.within(i))]
    for start, stop in blocks:
        behind = next((at for at, (border, _) in enumerate(borders) if border > start), len(borders))
        here = [i for _, i in borders[max(0, behind - 1) : behind + 1] if places.messages[i]["role"] == "assistant"]
        owner = here[-1] if here else None  # behind the texts of a turn only what ends it, such as an end token
        if owner in spans:
            kept = places.text[start:stop].rstrip()
            spans[owner].append((start, start + len(kept) if kept.endswith(closers.ends) else stop))
    for turn, found in spans.items():
        if found:
            found[0] = _behind_prompt(render, places, turn, found[0])
            found[-1] = _to_end(render, places, turn, found[-1], closers)
    return spans


def _behind_prompt(render: Renderer, places: Places, turn: int, block: Span) -> Span:
    """Return a turn's first block without what the generation prompt contains of it, such as the header of the turn."""
    before, after = render_around(render, places.messages, turn)
    blocks = render.generated(places.messages[: turn + 1]) or []
    begin = next((start for start, stop in blocks if stop > len(before)), len(before))
    header = common_prefix(after[begin : len(before)], places.text[block[0] : block[1]])
    return block[0] + len(header), block[1]


def _to_end(render: Renderer, places: Places, turn: int, block: Span, closers: Closers) -> Span:
    """Return a turn's last block up to its end token, which some templates leave out, without white space behind it."""
    start, stop = block
    kept = places.text[start:stop].rstrip()
    if kept.endswith(closers.ends):
        return start, start + len(kept)
    behind = places.text[stop:]
    end = max((token for token in closers.ends if behind.startswith(token)), key=len, default="")
    if not end:
        return block
    try:
        whole = find_spans(render, places, [turn], closers)[0][1]
    except RowFault:
        whole = stop + len(end) if end == closers.eos else stop
    return start, min(max(whole, stop), stop + len(end))


def _without_end(text: str, spans: Sequence[Span], closers: Closers) -> list[Span]:
    if not spans:
        return []
    *first, (start, stop) = spans
    return [*first, (start, start + len(closers.without(text[start:stop])))]


def _outside(text: str, muted: Sequence[Span]) -> list[Span]:
    """Return the spans of the text outside the given ones."""
    edges = [0, *(edge for span in sorted(muted) for edge in span), len(text)]
    return [(start, stop) for start, stop in zip(edges[::2], edges[1::2], strict=True) if stop > start]
