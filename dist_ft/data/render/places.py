"""The places of a conversation's texts in its rendering, proven by a second rendering of the same texts with marks.

Without its marks, the second rendering must be the first one, character by character. Then each mark stands where the
template has put the text that carries it, whatever other texts of the row say. Where marks change what a template
renders (it compares a text with a constant), the texts around the difference go unmarked, and must stand exactly once
between the marked texts around them. The number of renderings of a row is bounded, so the cost is linear in its length.
"""

from __future__ import annotations

import bisect
import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from ..read.faults import RowFault
from .parts import CLOSES_THOUGHT, MOST, TOOLS, Marker, Part, forms_of, free_base, free_number, tags_of, texts_of
from .renderer import OWN_TEMPLATE, Message, Renderer, Span

_ROUNDS = 12  # renderings with marks of one row
SHOWS = "set task.chat_template to one that renders it, such as chatml"
CALLS_AS_TEXT = (
    "set task.chat_template=tools_as_text, which writes tools and calls into texts that the model's template renders,"
    " llama3_calls for the calls of Llama 3.1 to 3.3, or a template that renders them, such as chatml"
)
KEEP_REASONING = (
    "set task.one_row_per_turn=true if only the last answer's reasoning is rendered, task.reasoning=inline to write it"
    " into the content in <think> tags, task.reasoning=keep to train what is rendered, task.reasoning=drop to train"
    " without it, or a template that renders it"
)


class LostReasoning(RowFault):
    """The rendering does not have the reasoning of a supervised turn."""


@dataclass(frozen=True)
class Places:
    """The parts of a conversation and where each of them stands in the rendered text."""

    text: str
    messages: Sequence[Message]
    parts: Sequence[Part]
    spans: Mapping[int, Sequence[Span]]  # by index of the part
    blocks: Sequence[Span] | None = None  # the template's `{% generation %}` blocks, see `Renderer.with_blocks`

    def within(self, owner: int) -> list[Span]:
        """Return the spans of a message's parts, in the order of the text."""
        return sorted(span for index in self._owned.get(owner, ()) for span in self.spans.get(index, ()))

    @cached_property
    def _owned(self) -> Mapping[int, Sequence[int]]:
        """Indices of the parts by owner."""
        owned: dict[int, list[int]] = {}
        for index, part in enumerate(self.parts):
            owned.setdefault(part.owner, []).append(index)
        return owned

    @cached_property
    def _foreign(self) -> Sequence[tuple[int, int, int]]:
        """Start, end and index of each part that must not stand inside the turn of another message, sorted."""
        kept = (i for i, part in enumerate(self.parts) if part.kind != "call")
        return sorted((start, stop, i) for i in kept for start, stop in self.spans.get(i, ()))

    def require(self, reasoned: Collection[int]) -> None:
        """Check that every part is rendered; of reasoning, only that of the messages `reasoned`.

        Raises:
            RowFault: A part is not rendered, or not as it is.
        """
        for index, part in enumerate(self.parts):
            if part.kind == "reasoning" and part.owner not in reasoned:
                continue
            if not self.spans.get(index):
                cause = f"the chat template does not render {self._name(part)}"
                if part.kind == "reasoning":
                    raise LostReasoning(cause, KEEP_REASONING)
                is_called = part.kind in ("call", "tool") or self._is_beside_calls(part)
                raise RowFault(cause, CALLS_AS_TEXT if is_called else SHOWS)
            is_whole = any(part.is_written(self.text[start:stop]) for start, stop in self.spans[index])
            if not is_whole or not self._is_joined(index, part):
                raise RowFault(f"the chat template changes {self._name(part)}", OWN_TEMPLATE)

    def require_inside(self, owner: int, spans: Sequence[Span], reasoned: Collection[int]) -> None:
        """Check that each part of a supervised turn stands inside one of its spans, and none of another message's.

        Of reasoning, this is required of the messages `reasoned`.

        Raises:
            RowFault: A part stands elsewhere.
        """
        for index in self._owned.get(owner, ()):
            part = self.parts[index]
            inside = [place for place in self.spans.get(index, ()) if _is_inside(place, spans)]
            single = len(inside) == 1 or (part.kind == "call" and inside)  # a name may be written twice in a call
            if not single and (part.kind != "reasoning" or owner in reasoned):
                where = "outside the part of the text that the model generates" if not inside else "more than once"
                raise RowFault(f"the chat template renders {self._name(part)} {where}", OWN_TEMPLATE)
            is_first = part.kind == "reasoning" and (index == 0 or self.parts[index - 1].kind != "reasoning")
            if is_first and inside and self._is_closed(spans[0][0], inside[0][0]):
                cause = "the chat template renders a closed block before the reasoning of an assistant message"
                raise LostReasoning(cause, KEEP_REASONING)
        for first, last in spans:
            at = bisect.bisect_left(self._foreign, (first, first, -1))
            for start, stop, index in itertools.islice(self._foreign, at, None):
                if start > last:
                    break
                part = self.parts[index]
                if part.owner != owner and stop <= last:
                    raise RowFault(f"the chat template renders {self._name(part)} inside an answer", OWN_TEMPLATE)

    def _is_closed(self, start: int, place: int) -> bool:
        """Return whether a block of reasoning is closed directly before a turn, or in the turn before this place."""
        before = self.text[max(0, start - 40) : start].rstrip()
        closed = any(tag.end() == len(before) for tag in CLOSES_THOUGHT.finditer(before))
        return closed or CLOSES_THOUGHT.search(self.text, start, place) is not None

    def _is_joined(self, index: int, part: Part) -> bool:
        """Return whether what is between this part and the previous one of the same text is rendered too."""
        if part.gap is None:
            return True
        ends, starts = ([span[i] for span in self.spans.get(at, ())] for i, at in ((1, index - 1), (0, index)))
        return any(self.text[end:start] in forms_of(part.gap) for end in ends for start in starts)

    def _is_beside_calls(self, part: Part) -> bool:
        return part.owner != TOOLS and bool(self.messages[part.owner].get("tool_calls"))

    def _name(self, part: Part) -> str:
        if part.owner == TOOLS:
            return "the row's tools"
        message = self.messages[part.owner]
        role = message["role"]
        if part.kind == "call":
            return "tool calls (a name or an argument of one)"
        if part.kind == "reasoning":
            return "the reasoning of an assistant message"
        if role == "assistant":
            return "the assistant's content" + (" beside its tool calls" if self._is_beside_calls(part) else "")
        return f"the content of a message of role {role}"


def find_places(
    render: Renderer, messages: Sequence[Message], text: str, blocks: Sequence[Span] | None = None
) -> Places:
    """Return where the texts of the messages and tools stand in `text`, their rendering with these `blocks`.

    Raises:
        RowFault: The places cannot be proven.
    """
    given = texts_of(messages, render.tools)
    base, other = free_base(given), free_base(text)
    if base is None or other is None:
        raise RowFault("a text has private-use characters of Unicode plane 16", "remove these characters")
    number, tags = free_number(given, text), tags_of(render.template, render.closes_thought)
    bare: set[int] = set()
    for _ in range(_ROUNDS):
        marker = Marker(base, number, tags, bare)
        marked = [marker.message(message, owner) for owner, message in enumerate(messages)]
        tools = [marker.tool(tool, at) for at, tool in enumerate(render.tools)] if render.tools else None
        if len(marker.parts) > MOST:
            raise RowFault(f"the row has more than {MOST} texts", "split the row")
        try:
            found = _read(render.with_tools(marked, tools), text, marker)
        except RowFault:  # the template refuses a marked name
            found = {i for i, part in enumerate(marker.parts) if part.kind in ("call", "tool")}
        if isinstance(found, dict):
            return Places(text, messages, marker.parts, _with_bare(found, text, marker), blocks)
        if not (new := _widened(found, bare, len(marker.parts))):
            break
        bare |= new
    raise RowFault("the places of the row's texts in the rendering of the chat template cannot be proven", OWN_TEMPLATE)


def _read(marked: str, text: str, marker: Marker) -> dict[int, list[Span]] | set[int]:
    """Return the places of the marked parts, or the parts around the first difference from the unmarked text."""
    base, last = marker.base, marker.base + 2 * MOST + 1
    has_numbers = any(not isinstance(part.value, str) for part in marker.parts)  # without them, the search is faster
    numbers = f"|{marker.number}(\\d{{6}})(?:\\.0)?" if has_numbers else "()"
    token = re.compile(f"[{chr(base)}-{chr(last)}]{numbers}")
    found: dict[int, list[Span]] = {}
    opened: dict[int, int] = {}
    position, at, previous = 0, 0, set[int]()
    for match in token.finditer(marked := _unescaped(marked, base, last)):
        index = int(match[1]) if match[1] else (ord(match[0]) - base) // 2
        piece = marked[at : match.start()]
        if index >= len(marker.parts) or not text.startswith(piece, position):
            return previous | {index}
        position, at = position + len(piece), match.end()
        if match[1]:
            forms = sorted(marker.parts[index].forms, key=len, reverse=True)
            form = next((form for form in forms if text.startswith(form, position)), None)
            if form is None:
                return {index}
            found.setdefault(index, []).append((position, position + len(form)))
            position += len(form)
        elif (ord(match[0]) - base) % 2 == 0:
            opened[index] = position
        elif index in opened:
            start = opened.pop(index)
            if start == position:  # a key, with both marks behind it
                start -= next((len(form) for form in marker.parts[index].forms if text.endswith(form, 0, start)), 0)
            found.setdefault(index, []).append((start, position))
        previous = {index}
    return found if text[position:] == marked[at:] else previous


def _unescaped(marked: str, first: int, last: int) -> str:
    """Return the text with marks in place of their escapes in JSON (two surrogates) and in Python literals."""
    if "\\" not in marked:
        return marked

    def character(match: re.Match[str]) -> str:
        high, low, whole = match.groups()
        code = int(whole, 16) if whole else 0x10000 + ((int(high, 16) - 0xD800) << 10) + int(low, 16) - 0xDC00
        return chr(code) if first <= code <= last else match[0]

    return re.sub(r"\\u(d[89ab][0-9a-f]{2})\\u(d[c-f][0-9a-f]{2})|\\U([0-9a-f]{8})", character, marked)


def _widened(found: set[int], bare: set[int], count: int) -> set[int]:
    """Return the parts to leave unmarked next: those around the difference, or their marked neighbors."""
    new = {i for i in found if i < count} - bare
    if not new and found:
        below = next((i for i in range(min(found), -1, -1) if i not in bare), None)
        above = next((i for i in range(max(found), count) if i not in bare), None)
        new = {i for i in (below, above) if i is not None}
    return new


def _with_bare(found: dict[int, list[Span]], text: str, marker: Marker) -> dict[int, list[Span]]:
    """Add the places of unmarked parts: where one stands once between the nearest marked parts, it stands there."""
    places = dict(found)
    for index in sorted(marker.bare):
        below = next((found[i][0][1] for i in range(index - 1, -1, -1) if i in found), 0)
        above = next((found[i][0][0] for i in range(index + 1, len(marker.parts)) if i in found), len(text))
        spans = {
            (at.start(), at.end())
            for form in marker.parts[index].forms
            for at in re.compile(re.escape(form)).finditer(text, below, above)
        }
        if len(spans) == 1:
            places[index] = list(spans)
    return places


def _is_inside(place: Span, spans: Sequence[Span]) -> bool:
    return any(start <= place[0] and place[1] <= stop for start, stop in spans)
