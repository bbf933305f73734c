"""The prompt of an assistant turn, and the conversation up to and including this turn.

Rendering all that precedes each turn costs the square of the length of a conversation. In a long one, most turns are
therefore rendered behind the messages close to them alone: the system message, a user message, the previous assistant
turn and what follows it. From the header of this previous turn on, the rendering is compared with that of the whole
conversation, and a turn at which they differ is rendered behind all that precedes it.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from ..read.faults import RowFault
from .places import Places, find_places
from .renderer import OWN_TEMPLATE, Message, Renderer, Span, common_prefix

WHOLE = 8  # turns of a conversation up to which each is rendered behind all that precedes it


class PromptFault(RowFault):
    """The generation prompt ends with text that the rendered answer does not start with."""


@dataclass(frozen=True)
class Around:
    """A turn behind its prompt, from the point on where it is compared with the rendered conversation.

    Attributes:
        render: Renderer of the conversation.
        messages: Rendered messages; the turn is the last one.
        prompt: Rendering of the messages before the turn, with the generation prompt.
        rendered: Rendering of the messages, which starts with `prompt`.
        skipped: Position in `prompt` and `rendered` from which on they are compared.
        base: The same position in the rendered conversation.
        blocks: The template's `{% generation %}` blocks in `rendered`, see `Renderer.with_blocks`.
    """

    render: Renderer
    messages: Sequence[Message]
    prompt: str
    rendered: str
    skipped: int = 0
    base: int = 0
    blocks: Sequence[Span] | None = None

    @property
    def before(self) -> str:
        """The compared part of the prompt."""
        return self.prompt[self.skipped :]

    @property
    def after(self) -> str:
        """The compared part of the rendering."""
        return self.rendered[self.skipped :]

    @cached_property
    def places(self) -> Places:
        """Places of the texts in the rendering."""
        return find_places(self.render, self.messages, self.rendered)

    def within(self) -> list[Span]:
        """Return the spans of the texts of the turn, as positions in `after`."""
        found = self.places.within(len(self.messages) - 1)
        return [(start - self.skipped, stop - self.skipped) for start, stop in found]


def turns_of_whole(turns: Sequence[int]) -> Collection[int]:
    """Return the turns that are rendered behind all that precedes them.

    These are the first ones, those whose number is a power of two, and the last one: together at most a multiple of the
    length of the conversation.
    """
    chosen = {turn for number, turn in enumerate(turns, 1) if number <= WHOLE or number & (number - 1) == 0}
    return chosen | {*turns[-1:]}


def behind_all(render: Renderer, places: Places, turn: int) -> Around:
    """Return a turn behind all that precedes it.

    Args:
        render: Renderer of the conversation.
        places: The rendered conversation.
        turn: Index of the turn.

    Raises:
        RowFault: The turn has no prompt, or the rendered turn does not start with it.
    """
    is_last = turn == len(places.messages) - 1  # then the conversation is rendered already
    return _behind(render, places.messages[: turn + 1], (places.text, places.blocks) if is_last else None)


def _behind(
    render: Renderer, messages: Sequence[Message], known: tuple[str, Sequence[Span] | None] | None = None
) -> Around:
    """Return the last message behind the others, given the rendering and blocks of them all if they are known."""
    if len(messages) == 1:
        raise RowFault("the conversation starts with an assistant turn", "start with a user turn, or drop these rows")
    prompt = render(messages[:-1], generation=True)
    rendered, blocks = known or render.with_blocks(messages)
    if not rendered.startswith(prompt):
        tail = prompt[len(common_prefix(prompt, rendered)) :][-40:]
        cause = f"the chat template's generation prompt ends with {tail!r}, which the rendered answer does not contain"
        raise PromptFault(
            cause,
            "set task.one_row_per_turn=true if this prompt is rendered before the last answer alone, or"
            " task.chat_template_kwargs (or this column of the rows) to render it without this text (such as"
            " {enable_thinking: false} for answers without reasoning), or "
            f"{OWN_TEMPLATE}",
        )
    return Around(render, messages, prompt, rendered, blocks=blocks)


def behind_near(render: Renderer, places: Places, turn: int) -> Around | None:
    """Return a turn behind the messages close to it, or None if they cannot be chosen or compared.

    Args:
        render: Renderer of the conversation.
        places: The rendered conversation.
        turn: Index of the turn.
    """
    chosen = _near(places.messages, turn)
    if chosen is None:
        return None
    kept, anchor = chosen
    try:
        around = _behind(render, [places.messages[i] for i in kept])
        there, here = around.places.within(kept.index(anchor)), places.within(anchor)
    except RowFault:
        return None
    if not there or not here:
        return None
    return replace(around, skipped=there[-1][1], base=here[-1][1])


def _near(messages: Sequence[Message], turn: int) -> tuple[list[int], int] | None:
    """Return the indices of the messages close to a turn, with it as the last, and that before the previous answer."""
    previous = _answer_before(messages, turn - 1)
    first = previous
    if previous is not None and messages[previous - 1]["role"] != "user":  # its own predecessor is a result of a call
        first = _answer_before(messages, previous - 1)
    if previous is None or first is None:
        return None
    user = next((i for i in range(first - 1, -1, -1) if messages[i]["role"] == "user"), None)
    if user is None:
        return None
    head = next(i for i, message in enumerate(messages) if message["role"] not in ("system", "developer"))
    return [*range(head), user, *range(first, turn + 1)], previous - 1


def _answer_before(messages: Sequence[Message], stop: int) -> int | None:
    """Return the index of the last answer before `stop` that follows another role, or None if there is none."""
    roles = ((i, messages[i - 1]["role"], messages[i]["role"]) for i in range(stop - 1, 0, -1))
    return next((i for i, before, role in roles if role == "assistant" != before), None)
