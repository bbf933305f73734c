"""The forms in which the rows of a conversation are given to a chat template, until one is rendered completely.

Templates differ in where they read reasoning and arguments of calls, and in what their generation prompt opens. Every
form has the same texts, and each rendering is checked in the same way (places.py).
"""

from __future__ import annotations

import contextlib
import functools
import json
import re
from collections.abc import Iterator, Sequence
from typing import Any

from ...config.task import Reasoning
from .parts import PROTECTED, REASONING_KEYS, THOUGHT
from .renderer import Message, Renderer, RenderFault
from .template_file import defaults_of
from .turns import without_flags

Form = tuple[Renderer, list[Message], Sequence[int]]  # the last: messages whose reasoning has to be rendered
_SWITCHES = re.compile(r"(?<![\w.'\"])(enable_thinking|thinking|reasoning)(?![\w'\"])")


def row_forms(
    render: Renderer, messages: Sequence[Message], turns: Sequence[int], reasoning: Reasoning
) -> Iterator[Form]:
    """Yield a conversation in the forms in which the chat template may render all of it.

    Args:
        render: Renderer with the tools and variables of the row.
        messages: The conversation.
        turns: Indices of the supervised messages.
        reasoning: `task.reasoning`.
    """
    given, reasoned = settled(without_flags(messages), reasoning), turns[-1:] if reasoning == "keep" else turns
    thinks = any("reasoning_content" in _keyed(given[turn]) for turn in turns)
    for renders in (render, *_switched(render, thinks=thinks)):
        for renderer, form in _forms(renders, given, thinks=thinks):
            yield renderer, form, reasoned
    if not thinks:
        for renderer, form in _shielded(render, given, empty=True):
            yield renderer, form, reasoned
    if reasoning == "keep":
        yield render, given, []


def settled(messages: Sequence[Message], reasoning: Reasoning) -> list[Message]:
    """Return the messages with the reasoning that `task.reasoning` says: as given, none, or in the content."""
    if reasoning == "drop":
        return without_reasoning(messages)
    return [_inline(_keyed(message)) for message in messages] if reasoning == "inline" else list(messages)


def _forms(render: Renderer, given: list[Message], *, thinks: bool) -> Iterator[tuple[Renderer, list[Message]]]:
    """Yield the conversation with these variables of the template; arguments of calls as objects, then as text."""
    for row in (given, with_text_arguments(given)):
        if row is not None:
            for form in reasoning_forms(row, render.template):
                yield render, form
            yield from _shielded(render, row, empty=False)
            if not thinks and not render.marks_answers:
                yield render.but(fills_block=True), row


def _switched(render: Renderer, *, thinks: bool) -> Iterator[Renderer]:
    """Yield renderers with the switches for reasoning that the template has, set as the supervised turns have it.

    What the user sets, for the run or for the row, is not changed.
    """
    for name in _switches(render.template):
        if name not in render.variables:
            yield render.but(variables={**render.variables, name: thinks})


@functools.lru_cache(maxsize=256)
def _switches(template: str) -> list[str]:
    """Return the switches for reasoning that a template has, except those with a default of the run."""
    return sorted({*_SWITCHES.findall(template)} - defaults_of(template))


def _shielded(render: Renderer, given: list[Message], *, empty: bool) -> Iterator[tuple[Renderer, list[Message]]]:
    """Yield the conversation with a block of reasoning that the template cannot cut away, if its prompt opens one."""
    prompt = _prompt(render, given)
    if prompt is not None and (form := protected_form(given, prompt, empty=empty)) is not None:
        yield render.but(closes_thought=PROTECTED), form


def _prompt(render: Renderer, given: list[Message]) -> str | None:
    """Return the prompt of an answer at the end, or None if there is no such answer or the template says its span."""
    if len(given) < 2 or given[-1]["role"] != "assistant" or render.marks_answers:
        return None
    with contextlib.suppress(RenderFault):
        return render(given[:-1], generation=True)
    return None


def without_reasoning(messages: Sequence[Message]) -> list[Message]:
    """Return the messages without reasoning, in keys of its own or in `<think>` tags at the start of the content."""
    kept = [{key: value for key, value in message.items() if key not in REASONING_KEYS} for message in messages]
    return [
        {**message, "content": THOUGHT.sub("", message["content"])} if message["role"] == "assistant" else message
        for message in kept
    ]


def reasoning_forms(messages: Sequence[Message], template: str) -> Iterator[list[Message]]:
    """Yield the conversation with its reasoning as given, then in the other forms that the chat template names.

    transformers gives reasoning to templates as `reasoning_content` and `thinking`. Others read `reasoning`, or a
    `<think>` block at the start of the content.
    """
    given = list(messages)
    yield given
    keyed = [_keyed(message) for message in messages]
    if keyed != given and "reasoning_content" in template:
        yield keyed
    if any("reasoning_content" in message for message in keyed):
        if "reasoning" in template:
            yield [_renamed(message) for message in keyed]
        if "</think>" in template:
            yield [_inline(message) for message in keyed]


def with_text_arguments(messages: Sequence[Message]) -> list[Message] | None:
    """Return the messages with the arguments of calls as JSON text, which some templates need; None without calls."""
    if not any(message.get("tool_calls") for message in messages):
        return None
    changed = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"]["arguments"])}}
            for call in message.get("tool_calls") or ()
        ]
        changed.append({**message, "tool_calls": calls} if calls else message)
    return changed


def protected_form(messages: Sequence[Message], prompt: str, *, empty: bool) -> list[Message] | None:
    """Return the conversation with the reasoning of its last answer in a block that the template cannot cut away.

    Some templates open a `<think>` block in the generation prompt and cut what is in such a block out of all answers
    (DeepSeek-R1, QwQ), also out of the last one. Here PROTECTED stands for `</think>`; the renderer restores it.

    Args:
        messages: The conversation.
        prompt: The rendered prompt of the last message.
        empty: Whether an answer without reasoning gets an empty block.

    Returns:
        None if the prompt opens no block, or there is no reasoning.
    """
    opening = re.search(r"<think>(\s*)$", prompt)
    last = _keyed(messages[-1])
    thought = str(last.pop("reasoning_content", "")).strip()
    if opening is None or not (thought or empty) or any(PROTECTED in str(m) for m in messages):
        return None
    blank = opening[1]
    block = f"<think>{blank}{thought}{blank}{PROTECTED}{blank * 2}"
    return [*messages[:-1], {**last, "content": block + last["content"]}]


def _keyed(message: Message) -> Message:
    """Return the message with its reasoning as `reasoning_content` alone."""
    if message["role"] != "assistant":
        return message
    rest = {key: value for key, value in message.items() if key not in REASONING_KEYS}
    thought = next((message[key] for key in REASONING_KEYS if message.get(key)), None)
    if thought is None and (match := THOUGHT.match(message["content"])):
        thought, rest["content"] = match[1].strip(), message["content"][match.end() :]
    return {**rest, "reasoning_content": thought} if thought else rest


def _renamed(message: Message) -> Message:
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "reasoning": message["reasoning_content"]} if "reasoning_content" in message else rest


def _inline(message: Message) -> Message:
    if "reasoning_content" not in message:
        return message
    rest = {key: value for key, value in message.items() if key != "reasoning_content"}
    return {**rest, "content": f"<think>\n{message['reasoning_content'].strip()}\n</think>\n\n{message['content']}"}


def _json(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
