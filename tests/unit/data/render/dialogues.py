"""Conversations whose every text is written in letters of its own, and an oracle that reads off these letters.

Each text has an alphabet of 40 Hangul syllables, and templates have none. So which message a character of a rendering
comes from is seen from the character alone, whatever the template does and however its text is tokenized.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from itertools import groupby, pairwise
from typing import Any

from jinja2 import TemplateError

from dist_ft.data.read.formats import IGNORED_LABEL

Message = dict[str, Any]
WORD = re.compile("[\uac00-\ud7a3]+")
ALPHABET = 40  # letters of a text


def words(number: int, count: int = 3) -> str:
    """A text of `count` words in the alphabet `number`."""
    first = 0xAC00 + number * ALPHABET
    return " ".join("".join(chr(first + (5 * word + at) % ALPHABET) for at in range(4)) for word in range(count))


NAME, KEY, PURPOSE = words(50, 1), words(51, 1), words(52)
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": NAME,
            "description": PURPOSE,
            "parameters": {
                "type": "object",
                "properties": {KEY: {"type": "string"}, "n": {"type": "integer"}},
                "required": [KEY],
            },
        },
    }
]


def user(number: int) -> Message:
    """What the user says."""
    return {"role": "user", "content": words(number)}


def said(number: int, **more: Any) -> Message:
    """An answer."""
    return {"role": "assistant", "content": words(number), **more}


def called(*numbers: int, content: str = "", more: Mapping[str, Any] | None = None, **other: Any) -> Message:
    """Calls of the same function, each with its own argument."""
    calls = [
        {
            "id": f"call{number:05}",
            "type": "function",
            "function": {"name": NAME, "arguments": {KEY: words(number, 2), **(more or {})}},
        }
        for number in numbers
    ]
    return {"role": "assistant", "content": content, "tool_calls": calls, **other}


RESULT = {"role": "tool", "name": NAME, "tool_call_id": "call00008", "content": words(10)}
THOUGHT = f"<think>\n{words(6)}\n</think>\n\n{words(2)}"
DIALOGUES: dict[str, tuple[list[Message], list[Any] | None]] = {
    "plain": ([user(1), said(2)], None),
    "multi": ([user(1), said(2), user(3), said(4)], None),
    "spaces": ([user(1), {"role": "assistant", "content": f" \n {words(2)}"}], None),
    "system": ([{"role": "system", "content": words(5)}, user(1), said(2)], None),
    "developer": ([{"role": "developer", "content": words(5)}, user(1), said(2)], None),
    "flagged": ([user(1), said(2, weight=0), user(3), said(4)], None),
    "reasoning": ([user(1), said(2, reasoning_content=words(6))], None),
    "inline": ([user(1), {"role": "assistant", "content": THOUGHT}], None),
    "all_reasoning": ([user(1), said(2, thinking=words(6)), user(3), said(4, thinking=words(7))], None),
    "last_reasoning": ([user(1), said(2, weight=0, thinking=words(6)), user(3), said(4, thinking=words(7))], None),
    "tools": ([user(1), said(2)], TOOLS),
    "call": ([user(1), called(8)], TOOLS),
    "text_call": ([user(1), called(8, content=words(2))], TOOLS),
    "two_calls": ([user(1), called(8, 9)], TOOLS),
    "quoted": ([{"role": "user", "content": f"{words(1)} {NAME} {KEY} {words(8, 2)}"}, called(8)], TOOLS),
    "values": ([user(1), called(8, more={"n": 17, "f": 0.25, "b": True, "s": "q\"\n'x", "l": [1, "a"]})], TOOLS),
    "loop": ([user(1), called(8), RESULT, said(2)], TOOLS),
    "thinking_loop": ([user(1), called(8, thinking=words(6)), RESULT, said(2, thinking=words(7))], TOOLS),
    "after_loop": ([user(1), called(8), RESULT, said(2), user(3), said(4)], TOOLS),
}


def faults(
    tokenizer: Any, messages: Sequence[Message], tools: Any, encoded: Mapping[str, list[int]], *, marks: bool = False
) -> list[str]:
    """What is wrong with an encoded conversation.

    Args:
        tokenizer: Tokenizer with the chat template.
        messages: The conversation; the assistant turns are supervised, unless their weight is 0.
        tools: The row's tools.
        encoded: `input_ids` and `labels` of the product.
        marks: Whether the template says itself which tokens are supervised.
    """
    ids, labels = encoded["input_ids"], encoded["labels"]
    learned = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m.get("weight", 1)]
    whole = _count(_unescaped(tokenizer.decode(ids)))
    runs = groupby(zip(ids, labels, strict=True), key=lambda pair: pair[1] != IGNORED_LABEL)
    decoded = (tokenizer.decode([token for token, _ in run]) for is_learned, run in runs if is_learned)
    supervised = _count(*map(_unescaped, decoded))
    texts = {i: _count(*_texts(message)) for i, message in enumerate(messages)}
    wanted = sum((texts[i] for i in learned), Counter())
    found = []
    if missing := set(wanted) - set(supervised):
        found.append(f"{len(missing)} words of an answer are not learned")
    if any(supervised[word] < count for word, count in wanted.items() if word != NAME):
        found.append("a word that is answered twice is learned once")
    if foreign := set(supervised) - set(wanted):
        found.append(f"{len(foreign)} words that are no answer are learned")
    shown = sum((texts[i] for i, m in enumerate(messages) if i in learned or m["role"] != "assistant"), Counter())
    if tools:
        shown += _count(f"{NAME} {PURPOSE} {KEY}")
    if any(whole[word] < count for word, count in shown.items() if word != NAME):
        found.append("words are not rendered")
    starts = sum(a == IGNORED_LABEL != b for a, b in pairwise([IGNORED_LABEL, *labels]))
    if not marks and starts != len(learned):
        found.append("a token between the prompt and the end of an answer is not learned")
    return [*found, *_border_faults(tokenizer, messages, tools, encoded, learned[-1])]


def _border_faults(
    tokenizer: Any, messages: Sequence[Message], tools: Any, encoded: Mapping[str, list[int]], turn: int
) -> Iterator[str]:
    """What is wrong around the last supervised turn: its prompt and its end."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    end = max(i for i, label in enumerate(labels) if label != IGNORED_LABEL)
    if tokenizer.decode([ids[end]]) not in tokenizer.get_added_vocab():
        yield "no end token is learned"
    run = next((i for i in range(end, -1, -1) if labels[i] == IGNORED_LABEL), -1)
    if labels[run + 1 : end].count(tokenizer.eos_token_id):
        yield "something behind the end token is learned"
    prompt = next(
        (prompt for prompt in _prompts(tokenizer, messages, turn, tools) if ids[: len(prompt)] == prompt), None
    )
    if prompt is None:
        yield "the tokens before the answer are not those of the prompt"
    elif labels[len(prompt) - 1] != IGNORED_LABEL:
        yield "the end of the prompt is learned"


def _prompts(tokenizer: Any, messages: Sequence[Message], turn: int, tools: Any) -> Iterator[list[int]]:
    """The prompts of a turn, with the forms of messages that templates read and a switch set as the turn has it."""
    history = [{key: value for key, value in message.items() if key != "weight"} for message in messages[:turn]]
    thinks = bool({"reasoning_content", "thinking"} & {*messages[turn]}) or "<think>" in messages[turn]["content"]
    system = _as_system(history)
    for form in (history, _inline(history), system, _in_parts(history), _in_parts(system)):
        for written in (form, _with_text(form)):
            for variables in ({}, {"enable_thinking": thinks}, {"thinking": thinks}):
                options = {"tools": tools, "add_generation_prompt": True, "return_dict": True, **variables}
                with contextlib.suppress(TypeError, ValueError, TemplateError):
                    yield list(tokenizer.apply_chat_template(written, **options)["input_ids"])


def _with_text(messages: Sequence[Message]) -> list[Message]:
    """The conversation with arguments of calls as text."""
    given = deepcopy(list(messages))
    for call in (call["function"] for message in given for call in message.get("tool_calls", ())):
        call["arguments"] = json.dumps(call["arguments"], ensure_ascii=False)
    return given


def _as_system(messages: Sequence[Message]) -> list[Message]:
    """The conversation with what the developer says as the system's."""
    return [{**message, "role": "system"} if message["role"] == "developer" else message for message in messages]


def _in_parts(messages: Sequence[Message]) -> list[Message]:
    """The conversation with content as lists of parts."""
    return [{**message, "content": [{"type": "text", "text": message["content"]}]} for message in messages]


def _inline(messages: Sequence[Message]) -> list[Message]:
    """The conversation with its reasoning in the content, the other form in which templates may show it."""
    return [
        {**message, "thinking": None, "content": f"<think>\n{message['thinking']}\n</think>\n\n{message['content']}"}
        if "thinking" in message
        else message
        for message in messages
    ]


def _unescaped(text: str) -> str:
    """The text with the letters that it has in place of their escapes in JSON."""
    return re.sub(r"\\u(\w{4})", lambda match: chr(int(match[1], 16)), text)


def _count(*texts: str) -> Counter[str]:
    return Counter(word for text in texts for word in WORD.findall(text))


def _texts(value: Any) -> Iterator[str]:
    """All texts of a message; of a result not its name, which only some templates show."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for item in value:
            yield from _texts(item)
    elif isinstance(value, Mapping):
        for name, item in value.items():
            if name in ("role", "id", "type", "tool_call_id") or (name == "name" and value.get("role") == "tool"):
                continue
            yield from _texts(item)
            yield name  # of an argument; other names have no letters of an alphabet
