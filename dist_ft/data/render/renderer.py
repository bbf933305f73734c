"""Rendering of conversations with the chat template of a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2

from ...errors import RequestError
from ..read.faults import RowFault

Message = dict[str, Any]
Span = tuple[int, int]  # half-open, in characters of a rendering
OWN_TEMPLATE = "set task.chat_template to chatml, or to a Jinja file that renders a turn the same at any position"
_MARKS = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")
_RENDER_ERRORS = (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError)


class RenderFault(RowFault):
    """The chat template raises an error for a row."""


class Renderer:
    """Function that renders messages with the chat template of a tokenizer.

    Args:
        tokenizer: transformers tokenizer.
        tools: Tool descriptions for the chat template.
        variables: Variables of the chat template for this row.
        closes_thought: Character that stands for `</think>` in the messages, so that the template cannot cut there.

    Raises:
        RequestError: The tokenizer has no chat template.
    """

    def __init__(
        self,
        tokenizer: Any,
        tools: Sequence[Mapping[str, Any]] | None,
        variables: Mapping[str, Any] | None = None,
        closes_thought: str | None = None,
    ) -> None:
        self.tokenizer = tokenizer
        self.variables = dict(variables or {})
        self.closes_thought = closes_thought
        self.tools = list(tools) if tools else None
        try:
            self.template: str = tokenizer.get_chat_template(None, self.tools)
        except ValueError as error:
            raise RequestError.of(
                "task.chat_template",
                "the tokenizer has no chat template, but the data contains messages",
                "set task.chat_template=chatml or a Jinja file, or use prompt and completion as strings",
            ) from error

    def __call__(self, messages: Sequence[Message], *, generation: bool = False) -> str:
        return self._apply(self.tools, messages, add_generation_prompt=generation)

    def with_tools(self, messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
        """Render with other tool descriptions than those of the row."""
        return self._apply(tools, messages, add_generation_prompt=False)

    @property
    def marks_answers(self) -> bool:
        """Whether the template has `{% generation %}` blocks."""
        return bool(_MARKS.search(self.template))

    def generated(self, messages: Sequence[Message]) -> list[Span] | None:
        """Return the spans of the template's `{% generation %}` blocks, or None if it has no such block."""
        if not self.marks_answers:
            return None
        from transformers.utils.chat_template_utils import render_jinja_template

        kept = [{key: value for key, value in message.items() if value is not None} for message in messages]
        _, spans = render_jinja_template(
            conversations=[kept],
            tools=self.tools,
            chat_template=self.template,
            return_assistant_tokens_mask=True,
            **{**self.tokenizer.special_tokens_map, **self.variables},
        )
        return [(start, stop) for start, stop in spans[0] if stop > start]

    def _apply(self, tools: Any, messages: Sequence[Message], **options: Any) -> str:
        try:
            given = {"tools": tools, "tokenize": False, **self.variables, **options}
            text = str(self.tokenizer.apply_chat_template(list(messages), **given))
        except _RENDER_ERRORS as error:
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            way_out = "correct the rows, or set task.chat_template to a template that supports them"
            raise RenderFault(f"the chat template cannot render the row: {reason}", way_out) from error
        return text.replace(self.closes_thought, "</think>") if self.closes_thought else text
