"""Conversion of the message formats of datasets to chat messages as chat templates expect them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FLAGS = ("weight", "loss", "train")  # of a message: whether it is supervised (data/render/turns.py)
RESERVED = ("messages", "tools", "add_generation_prompt")  # variables of a chat template that rows determine
ROLES = ("system", "developer", "user", "assistant", "tool")
_SHAREGPT_ROLES = {
    "system": "system",
    "human": "user",
    "user": "user",
    "gpt": "assistant",
    "assistant": "assistant",
    "model": "assistant",
    "function_call": "function_call",
    "observation": "tool",
    "function_response": "tool",
    "tool": "tool",
}


class RowShape(Exception):
    """Error for a row whose values do not match its format."""

    def __init__(self, rule: str, way_out: str = "fix or remove the row", seen: str = "") -> None:
        super().__init__(rule)
        self.way_out = way_out
        self.seen = seen  # what this row has instead


def check_messages(value: Any) -> list[dict[str, Any]]:
    """Return validated messages with supported roles and string content, without keys whose value is None.

    Raises:
        RowShape: The value is not a list of such messages.
    """
    value = _parsed(value, "messages")
    if not isinstance(value, list) or not value:
        raise RowShape("messages must be a list with at least one message")
    return [_check_message(message, number) for number, message in enumerate(value, start=1)]


def check_tools(value: Any) -> list[Any]:
    """Return tool descriptions as chat templates expect them, from a list or its JSON string; empty if not given.

    Raises:
        RowShape: The value is not a list of objects.
    """
    if value is None or value == "":
        return []
    value = _parsed(value, "tools")
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise RowShape("tools must be a list of objects, or a JSON string of one")
    tools = [_without_nulls(tool) for tool in value]
    return [{"type": "function", "function": tool} if "name" in tool else tool for tool in tools]


def check_variables(value: Any) -> dict[str, Any]:
    """Return a row's own variables of the chat template, from an object or its JSON string; empty if not given.

    Raises:
        RowShape: The value is not an object, or names what comes from other columns.
    """
    if value is None or value == "":
        return {}
    value = _parsed(value, "chat_template_kwargs")
    if not isinstance(value, Mapping):
        raise RowShape("chat_template_kwargs must be an object")
    if given := [name for name in RESERVED if name in value]:
        raise RowShape(f"chat_template_kwargs has {', '.join(given)}, which other columns determine")
    return dict(_without_nulls(value))


def messages_of_sharegpt(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert ShareGPT `conversations` of {from, value}, with an optional column `system`, to messages.

    Raises:
        RowShape: A turn or role does not match this format.
    """
    turns = _parsed(row["conversations"], "conversations")
    if not isinstance(turns, list) or not turns:
        raise RowShape("conversations must be a list with at least one turn")
    messages = _system(row)
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or "from" not in turn or "value" not in turn:
            found = ", ".join(turn) if isinstance(turn, dict) else type(turn).__name__
            way_out = "set data.columns={messages: conversations} if its turns have role and content"
            raise RowShape(f"turn {number} has {found}, not from and value", way_out)
        role = _SHAREGPT_ROLES.get(turn["from"])
        if role is None:
            raise RowShape(f"turn {number} is from {turn['from']!r}", f"use one of {', '.join(_SHAREGPT_ROLES)}")
        content = _text_of(turn["value"], number)
        flags = {name: turn[name] for name in FLAGS if turn.get(name) is not None}
        if role == "function_call":
            messages.append({"role": "assistant", "content": "", "tool_calls": _calls(content, number), **flags})
        else:
            messages.append({"role": role, "content": content, **flags})
    return messages


def messages_of_alpaca(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Convert Alpaca rows (instruction, input, output) or Dolly rows (instruction, context, response) to messages.

    The input is appended to the instruction after a blank line. `history` holds earlier (instruction, output) pairs.

    Raises:
        RowShape: A value is not a string.
    """
    instruction = _text_of(row["instruction"])
    given = _text_of(row.get("input") or row.get("context") or "")
    answer = _text_of(row["output"] if "output" in row else row["response"])
    messages = _system(row)
    for pair in row.get("history") or ():
        if not isinstance(pair, list | tuple) or len(pair) != 2:
            raise RowShape("history must be a list of (instruction, output) pairs")
        messages += [
            {"role": "user", "content": _text_of(pair[0])},
            {"role": "assistant", "content": _text_of(pair[1])},
        ]
    prompt = f"{instruction}\n\n{given}" if given.strip() else instruction
    return [*messages, {"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]


def _system(row: Mapping[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "system", "content": _text_of(row["system"])}] if row.get("system") else []


def _check_message(message: Any, number: int) -> dict[str, Any]:
    if not isinstance(message, Mapping) or "role" not in message:
        found = ", ".join(map(str, message)) if isinstance(message, Mapping) else type(message).__name__
        way_out = "set data.format=sharegpt with data.columns={conversations: messages}"
        raise RowShape(f"message {number} has {found}, not role and content", way_out)
    message = _modern(message)
    if message["role"] not in ROLES:
        raise RowShape(f"message {number} has the role {message['role']!r}", f"use one of {', '.join(ROLES)}")
    kept: dict[str, Any] = {name: _without_nulls(value) for name, value in message.items() if value is not None}
    if kept.get("tool_calls"):
        kept["tool_calls"] = [_check_call(call, number) for call in _parsed(kept["tool_calls"], "tool_calls")]
    elif kept.get("content") is None:
        raise RowShape(f"message {number} has neither content nor tool_calls")
    kept["content"] = _text_of(kept.get("content", ""), number)
    return kept


def _modern(message: Mapping[str, Any]) -> dict[str, Any]:
    """Return a message with tool calls instead of `function_call` and the role `function`, their older form."""
    modern = dict(message)
    if modern["role"] == "function":
        modern["role"] = "tool"
    if (call := modern.pop("function_call", None)) and not modern.get("tool_calls"):
        modern["tool_calls"] = [call]
    return modern


def _calls(text: str, number: int) -> list[dict[str, Any]]:
    value = _parsed(text, f"the function call of turn {number}")
    return [_check_call(call, number) for call in (value if isinstance(value, list) else [value])]


def _check_call(call: Any, number: int) -> dict[str, Any]:
    """Return a tool call in the OpenAI format that chat templates expect, with its arguments as an object."""
    function = call.get("function", call) if isinstance(call, Mapping) else None
    if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
        raise RowShape(f"message {number} has a tool call without a function name")
    arguments = function.get("arguments")
    if isinstance(arguments, str):
        arguments = _parsed(arguments, f"the arguments of message {number}") if arguments.strip() else {}
    extra = {key: value for key, value in call.items() if key == "id"}
    function = {"name": function["name"], "arguments": {} if arguments is None else arguments}
    return {**extra, "type": "function", "function": function}


def _text_of(value: Any, number: int | None = None) -> str:
    """Return a string as is, or join a list of text parts."""
    if isinstance(value, str):
        return value
    if isinstance(value, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in value):
        return "".join(str(part.get("text", "")) for part in value)
    where = f"message {number}" if number else "a column"
    raise RowShape(f"the content of {where} is not a string", seen=f"{value!r:.40}")


def _parsed(value: Any, name: str) -> Any:
    """Parse a value that may be stored as a JSON string."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except json.JSONDecodeError as error:
        raise RowShape(f"{name}: invalid JSON ({error.msg})", seen=f"{value[:40]!r}") from error


def _without_nulls(value: Any) -> Any:
    """Remove null values, which columnar files store for keys that only other rows have, except in arguments of calls.

    A null argument may be meant; columnar.py removes those that are not.
    """
    if isinstance(value, Mapping):
        kept = {name: item for name, item in value.items() if item is not None}
        return {name: item if name == "arguments" else _without_nulls(item) for name, item in kept.items()}
    return [_without_nulls(item) for item in value] if isinstance(value, list) else value
