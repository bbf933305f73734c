"""Rendering of conversations with the chat template of a tokenizer."""

from __future__ import annotations

import copy
import functools
import inspect
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jinja2

from ...errors import RequestError
from ..read.faults import RowFault

Message = dict[str, Any]
Span = tuple[int, int]  # half-open, in characters of a rendering
OWN_TEMPLATE = "set task.chat_template to chatml, or to a Jinja file that renders a turn the same at any position"
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_TAG, _OPEN_TAG = re.compile(r"<[^<>]{1,40}>"), re.compile(r"<[^<>]{0,40}$")
_TAGS = re.compile(r"(?:\s*<[^<>]{1,40}>)*\s*")
_CLOSED = re.compile(r"\s*(?:<[^<>/]{1,40}>\s*\w*\s*)?(?:</[^<>]{1,40}>|<\|END_\w+\|>|<\w+\|>)\s*")  # an empty block
_PROBE = "\ue0f1"
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)


class RenderFault(RowFault):
    """The chat template raises an error for a row."""


@dataclass(frozen=True)
class Traits:
    """How a chat template reads messages.

    Attributes:
        parts: Whether it reads content as a list of parts (vision models).
        developer: Whether it renders messages of the role developer; if not, they are given as those of the system.
    """

    parts: bool = False
    developer: bool = True

    def adapt(self, messages: Sequence[Message]) -> list[Message]:
        """Return the messages as the template reads them."""
        changed = list(messages)
        if not self.developer:
            changed = [{**m, "role": "system"} if m["role"] == "developer" else m for m in changed]
        if self.parts:
            changed = [
                {**m, "content": [{"type": "text", "text": m["content"]}]} if isinstance(m.get("content"), str) else m
                for m in changed
            ]
        return changed


class Renderer:
    """Function that renders messages with the chat template of a tokenizer.

    Args:
        tokenizer: transformers tokenizer.
        tools: Tool descriptions for the chat template.
        variables: Variables of the chat template for this row.

    Attributes:
        closes_thought: Character that stands for `</think>` in the messages, so that the template cannot cut there.
        fills_block: Whether an answer at the end is rendered behind the empty block of reasoning that ends its prompt,
            where the template renders it without (Gemma 4, Command R7B).

    Raises:
        RequestError: The tokenizer has no chat template.
    """

    closes_thought: str | None = None
    fills_block: bool = False

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.tools = list(tools) if tools else None
        try:
            self.template: str = tokenizer.get_chat_template(None, self.tools)
        except ValueError as error:
            raise RequestError.of(
                "task.chat_template",
                "the tokenizer has no chat template, but the data contains messages",
                "set task.chat_template=chatml or a Jinja file, or use prompt and completion as strings",
            ) from error
        self.tokens: Mapping[str, str] = tokenizer.special_tokens_map
        tokens = ((name, text) for name, text in self.tokens.items() if isinstance(text, str))
        self.traits = _traits_of(self.template, tuple(sorted(tokens)))

    def but(self, **changed: Any) -> Renderer:
        """Return a renderer with other attributes."""
        other = copy.copy(self)
        for name, value in changed.items():
            setattr(other, name, value)
        return other

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        return self._render(self.tools, messages, generation=generation)

    def with_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Render with other tool descriptions than those of the row."""
        return self._render(tools, messages, generation=False)

    @property
    def marks_answers(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return bool(_MARKS.search(self.template))

    def with_blocks(self, messages: Sequence[Message]) -> tuple[str, Sequence[Span] | None]:
        """Return the rendering and the spans of its `{% generation %}` blocks, or None if the template has no block."""
        if not self.marks_answers:
            return self(messages), None
        text, spans = self._apply(self.tools, messages, tracks=True)
        return text, [(start, stop) for start, stop in spans if stop > start]

    def _render(self, tools: Any, messages: Sequence[Message], *, generation: bool) -> str:
        text, _ = self._apply(tools, messages, generation=generation)
        if not generation and len(messages) > 1 and messages[-1]["role"] == "assistant":
            if self.fills_block:
                text = self._filled(tools, messages[:-1], text)
            if self.closes_thought and self.closes_thought in messages[-1]["content"]:
                text = self._continued(tools, messages, text)
        return text.replace(self.closes_thought, "</think>") if self.closes_thought else text

    def _filled(self, tools: Any, before: Sequence[Message], text: str) -> str:
        """Return the rendering of an answer with the empty block at the end of its prompt, if it lacks one."""
        prompt, _ = self._apply(tools, before, generation=True)
        probe, _ = self._apply(tools, [*before, {"role": "assistant", "content": _PROBE}])
        header = _OPEN_TAG.sub("", common_prefix(prompt, probe))
        block, lead = prompt[len(header) :], probe[len(header) :].partition(_PROBE)[0]
        is_lacking = _CLOSED.fullmatch(block) and not any(tag in lead for tag in _TAG.findall(block))
        return prompt + text[len(header) :] if is_lacking and text.startswith(header) else text

    def _continued(self, tools: Any, messages: Sequence[Message], text: str) -> str:
        """Return the rendering of an answer with reasoning behind its prompt, without an empty block before it."""
        prompt, _ = self._apply(tools, messages[:-1], generation=True)
        block = messages[-1]["content"].partition(self.closes_thought)[0]
        header, at = prompt[: prompt.rfind("<think>")], text.rfind(block)
        if at > 0 and text.startswith(header) and _TAGS.fullmatch(text, len(header), at):
            return header + text[at:]
        return text

    def _apply(
        self, tools: Any, messages: Sequence[Message], *, generation: bool = False, tracks: bool = False
    ) -> tuple[str, list[Span]]:
        """Return the rendering as `apply_chat_template` does, and with `tracks` the spans of its generation blocks."""
        from transformers.utils.chat_template_utils import render_jinja_template

        kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
        adapted = self.traits.adapt(kept)
        try:
            if not tracks and self._needs_tokenizer:
                given = {"tools": tools, "tokenize": False, **self.variables, "add_generation_prompt": generation}
                return str(self.tokenizer.apply_chat_template(adapted, **given)), []
            (text,), spans = render_jinja_template(
                [adapted],
                tools=tools,
                chat_template=self.tokenizer.get_chat_template(None, tools),
                return_assistant_tokens_mask=tracks,
                add_generation_prompt=generation,
                **{**self.tokens, **self.variables},
            )
            return text, spans[0] if tracks else []
        except _RENDER_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            way_out = (
                "correct the rows, or set task.chat_template to a template that supports them, such as tools_as_text"
                " for tool calls, or chatml"
            )
            raise RenderFault(f"the chat template cannot render the row: {reason}", way_out) from error

    @property
    def _needs_tokenizer(self) -> bool:
        """Whether the tokenizer renders in its own way, or a variable of the row is one of its parameters."""
        own = getattr(type(self.tokenizer), "apply_chat_template", None)
        return own is not _usual_apply() or not self.variables.keys().isdisjoint(_parameters())


@functools.cache
def _usual_apply() -> Any:
    from transformers import PreTrainedTokenizerBase

    return PreTrainedTokenizerBase.apply_chat_template


@functools.cache
def _parameters() -> frozenset[str]:
    return frozenset(inspect.signature(_usual_apply()).parameters)


def common_prefix(one: str, other: str) -> str:
    """Return the longest common prefix."""
    length = next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    return one[:length]


@functools.lru_cache(maxsize=256)
def _traits_of(template: str, tokens: tuple[tuple[str, str], ...]) -> Traits:
    """Return how a chat template reads messages, from its renderings of short conversations."""
    from transformers.utils.chat_template_utils import render_jinja_template

    def shows(traits: Traits, *roles: str) -> bool:
        words = [f"word{number}" for number in range(len(roles))]
        messages = [{"role": role, "content": word} for role, word in zip(roles, words, strict=True)]
        try:
            (text,), _ = render_jinja_template([traits.adapt(messages)], chat_template=template, **dict(tokens))
        except _RENDER_ERRORS:
            return False
        return all(word in text for word in words)

    chat = ("user", "assistant")
    parts = not shows(Traits(), *chat) and shows(Traits(parts=True), *chat)
    developer = shows(Traits(parts), "developer", *chat) or not shows(Traits(parts), "system", *chat)
    return Traits(parts, developer)
