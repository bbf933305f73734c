"""The texts of a conversation, each enclosed in marks of its own, so that a rendering shows where each of them went.

A mark is one private-use character. A text is marked inside its outer white space, which templates strip, and inside
the tags that the template itself names (such as `<think>`), by which it splits texts. A number or boolean cannot carry
a mark and is replaced by a number that stands nowhere else.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from .renderer import Message

Kind = Literal["content", "reasoning", "call", "tool"]
TOOLS = -1  # owner of the tool descriptions
REASONING_KEYS = ("reasoning_content", "thinking", "reasoning")
THOUGHT = re.compile(r"^\s*<think>(.*?)</think>\s*", re.DOTALL)  # reasoning at the start of a content
_TAGS = re.compile(r"<[^<>\s'\"{}%]{1,40}>|\[/?[A-Z_]{2,20}\]|/(?:no_)?think\b")
PROTECTED = "\ue0f0"  # stands for `</think>` where the template must not cut, see turns.py
CLOSES_THOUGHT = re.compile(rf"</(?:\w+:)?think(?:ing)?>|\[/THINK\]|{PROTECTED}")
_PLANE = 0x100000  # supplementary private use area B
_TEXTS = json.JSONEncoder(ensure_ascii=False, default=str)
MOST = 0x7FFF  # marked texts of a row: two marks each, of the 65,534 characters of the plane


class Part(NamedTuple):
    """One text or number of a conversation."""

    owner: int  # index of the message, or TOOLS
    kind: Kind
    value: Any  # string, number or boolean
    at: int = 0  # number of the tool call or tool
    gap: str | None = None  # tags and white space between the previous part and this one, if both are of one text

    @property
    def forms(self) -> tuple[str, ...]:
        """The ways in which a template may write the value: as text, in JSON, or as a Python literal."""
        if isinstance(self.value, str):
            return forms_of(self.value)
        return (json.dumps(self.value), str(self.value))

    def is_written(self, text: str) -> bool:
        """Return whether the text is one of the forms."""
        return text == self.value or text in self.forms


@dataclass
class Marker:
    """Marks conversations and collects their parts.

    Args:
        base: Code point of the first mark.
        number: Digits at the start of the numbers that replace numbers.
        tags: Tags of the chat template.
        bare: Indices of the parts that stay unmarked.
    """

    base: int
    number: str
    tags: re.Pattern[str]
    bare: Collection[int] = ()
    parts: list[Part] = field(default_factory=list)

    def message(self, message: Message, owner: int) -> Message:
        """Return the message with all its texts marked."""
        marked = dict(message)
        for key in REASONING_KEYS:
            if isinstance(message.get(key), str):
                marked[key] = self._text(message[key], owner, "reasoning")
        if isinstance(message.get("content"), str):
            marked["content"] = self._content(message["content"], owner)
        if message.get("tool_calls"):
            marked["tool_calls"] = [self._call(call, owner, at) for at, call in enumerate(message["tool_calls"])]
        return marked

    def tool(self, tool: Mapping[str, Any], at: int) -> dict[str, Any]:
        """Return a tool description with its name, its description and the names of its parameters marked."""
        function = tool.get("function", tool)
        if not isinstance(function, Mapping):
            return dict(tool)
        marked = dict(function)
        for key in ("name", "description"):
            if isinstance(function.get(key), str):
                marked[key] = self._text(function[key], TOOLS, "tool", at)
        parameters = function.get("parameters")
        if isinstance(parameters, Mapping) and isinstance(properties := parameters.get("properties"), Mapping):
            names = {name: self._key(name, TOOLS, "tool", at) for name in properties}
            changed: dict[str, Any] = {"properties": {names[name]: value for name, value in properties.items()}}
            if isinstance(parameters.get("required"), list):  # the same names, by which templates look up parameters
                changed["required"] = [names.get(name, name) for name in parameters["required"]]
            marked["parameters"] = {**parameters, **changed}
        return {**tool, "function": marked} if "function" in tool else marked

    def _content(self, text: str, owner: int) -> str:
        if self.tags.search(text) is None:
            return self._text(text, owner, "content")
        closing = [tag.end() for tag in self.tags.finditer(text) if CLOSES_THOUGHT.fullmatch(tag[0])]
        if not closing:
            return self._text(text, owner, "content")
        stop = closing[-1]
        empty = not any(text[start:end].strip() for start, end in _between(text[:stop], self.tags))
        thought = text[:stop] if empty else self._text(text[:stop], owner, "reasoning")
        return thought + self._text(text[stop:], owner, "content")

    def _call(self, call: Mapping[str, Any], owner: int, at: int) -> dict[str, Any]:
        function = call["function"]
        name = self._text(function["name"], owner, "call", at)
        arguments = self._value(function["arguments"], owner, at)
        return {**call, "function": {**function, "name": name, "arguments": arguments}}

    def _value(self, value: Any, owner: int, at: int) -> Any:
        if isinstance(value, str):
            return self._text(value, owner, "call", at)
        if isinstance(value, Mapping):
            return {self._key(str(key), owner, "call", at): self._value(item, owner, at) for key, item in value.items()}
        if isinstance(value, list):
            return [self._value(item, owner, at) for item in value]
        if value is None:
            return None
        index = len(self.parts)
        self.parts.append(Part(owner, "call", value, at))
        replaced = int(f"{self.number}{index:06}")
        if index in self.bare:
            return value
        return float(replaced) if isinstance(value, float) else replaced

    def _key(self, key: str, owner: int, kind: Kind, at: int) -> str:
        """Return a key with both marks behind it, so that sorted keys keep their order."""
        index = len(self.parts)
        self.parts.append(Part(owner, kind, key, at))
        return key + self._marks(index)[0] + self._marks(index)[1]

    def _marks(self, index: int) -> tuple[str, str]:
        if index in self.bare or index >= MOST:
            return "", ""
        return chr(self.base + 2 * index), chr(self.base + 2 * index + 1)

    def _text(self, text: str, owner: int, kind: Kind, at: int = 0) -> str:
        pieces, last = [], 0
        for start, stop in _segments(text, self.tags):
            index = len(self.parts)
            self.parts.append(Part(owner, kind, text[start:stop], at, text[last:start] if last else None))
            opening, closing = self._marks(index)
            pieces += [text[last:start], opening, text[start:stop], closing]
            last = stop
        return "".join([*pieces, text[last:]])


def forms_of(text: str) -> tuple[str, ...]:
    """Return a text as it is, and as it is inside a string of JSON (with or without ASCII alone) or of Python."""
    return (text, *(form[1:-1] for form in (json.dumps(text, ensure_ascii=False), json.dumps(text), repr(text))))


@functools.lru_cache(maxsize=256)
def tags_of(template: str, closes_thought: str | None) -> re.Pattern[str]:
    """Return a pattern of the tags that a template names, by which it may split or search texts."""
    names = sorted({*_TAGS.findall(template), closes_thought or "</think>"}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, names)))


def free_base(text: str) -> int | None:
    """Return the code point from which on the text has no private-use character of plane 16, or None if it has some."""
    is_free = text.isascii() or re.search(f"[{chr(_PLANE)}-{chr(_PLANE + 0xFFFF)}]", text) is None
    return _PLANE if is_free else None


def free_number(*texts: str) -> str:
    """Return digits with which no number in the texts starts."""
    candidates = map(str, range(7310137, 9999999, 101))
    return next(digits for digits in candidates if not any(digits in text for text in texts))


def texts_of(messages: Sequence[Message], tools: Sequence[Mapping[str, Any]] | None) -> str:
    """Return all texts of a row in one string."""
    return _TEXTS.encode([list(messages), list(tools or ())])


def _segments(text: str, tags: re.Pattern[str]) -> list[tuple[int, int]]:
    """Return the spans of the text between tags, without outer white space; of a text of tags alone, the whole text."""
    found = [span for span in (_trimmed(text, *piece) for piece in _between(text, tags)) if span[0] < span[1]]
    whole = _trimmed(text, 0, len(text))
    return found or ([whole] if whole[0] < whole[1] else [])


def _between(text: str, tags: re.Pattern[str]) -> Iterator[tuple[int, int]]:
    last = 0
    for tag in tags.finditer(text):
        yield last, tag.start()
        last = tag.end()
    yield last, len(text)


def _trimmed(text: str, start: int, stop: int) -> tuple[int, int]:
    piece = text[start:stop]
    left = len(piece) - len(piece.lstrip())
    return start + left, start + left + len(piece.strip())
