"""Shipped templates around the model's own: the same text wherever it renders a row, and more rows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dist_ft.config.task import SHIPPED_TEMPLATES
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render import template_file
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.data.render.template_file import with_own
from dist_ft.errors import RequestError
from tests.unit.data.render.chats import shipped
from tests.unit.data.render.dialogues import DIALOGUES, RESULT, TOOLS, called, faults, said, user
from tests.unit.data.render.families import FAMILIES, Family

CALLS = ("call", "text_call", "two_calls", "quoted", "values", "loop", "after_loop")


def around(name: str, family: Family) -> Family:
    """A family with a shipped template around its own."""
    return replace(family, template=with_own(shipped(name), family.template))


def encoded(family: Family, dialogue: str) -> Any:
    """The encoded row, or None if it is refused; nothing of it may be wrong."""
    tokenizer = family.tokenizer()
    messages, tools = DIALOGUES[dialogue]
    try:
        row = ChatTokenizer(tokenizer).encode_messages(messages, tools)
    except RowFault:
        return None
    assert faults(tokenizer, messages, tools, row, marks="{% generation %}" in family.template) == []
    return row


def test_the_names_are_those_of_the_files() -> None:
    files = Path(template_file.__file__).parent.glob("*.jinja")
    assert sorted(path.stem for path in files) == sorted(SHIPPED_TEMPLATES)


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_without_tools_are_the_same_with_tools_as_text(family: str) -> None:
    changed = around("tools_as_text", FAMILIES[family])
    for dialogue, (_, tools) in DIALOGUES.items():
        if tools is None:
            assert encoded(changed, dialogue) == encoded(FAMILIES[family], dialogue), dialogue


@pytest.mark.parametrize(
    ("family", "refused"),
    [
        ("swallowed", []),
        ("headers", []),
        ("parts", []),
        ("cut_thought", ["loop", "after_loop"]),  # the prompt of an earlier answer opens a block
        ("instruct", ["tools", *CALLS]),  # no system message
    ],
)
def test_tools_and_calls_are_shown_as_text(family: str, refused: list[str]) -> None:
    changed = around("tools_as_text", FAMILIES[family])
    assert [dialogue for dialogue in ("tools", *CALLS) if encoded(changed, dialogue) is None] == refused


def test_results_follow_their_calls_in_one_message_of_the_user() -> None:
    tokenizer = around("tools_as_text", FAMILIES["swallowed"]).tokenizer()
    text = tokenizer.apply_chat_template([user(1), called(8, 9), RESULT, RESULT, said(2)], tokenize=False, tools=TOOLS)
    assert [text.count(f"<|{role}|>") for role in ("system", "user", "assistant")] == [1, 2, 2]
    assert text.count("<tool_response>") == text.count("<tool_call>\n{") - 1 == 2


def test_calls_of_llama_3_are_written_beside_text_and_each_other() -> None:
    own = FAMILIES["headers"]
    changed = around("llama3_calls", own)
    for dialogue in DIALOGUES:
        if (row := encoded(own, dialogue)) is not None:
            assert encoded(changed, dialogue) == row, dialogue
    for dialogue in ("text_call", "two_calls"):
        assert encoded(own, dialogue) is None and encoded(changed, dialogue) is not None
    single, beside = (
        changed.tokenizer().apply_chat_template(DIALOGUES[name][0], tokenize=False) for name in ("call", "text_call")
    )
    assert beside.replace(said(2)["content"] + "\n", "") == single


def test_a_template_around_none_is_refused() -> None:
    assert with_own(None, "own") == "own" and with_own("mine", None) == "mine"
    assert with_own(shipped("tools_as_text"), {"a": "own"})["a"].endswith("%}\nown")
    with pytest.raises(RequestError, match="the tokenizer has none"):
        with_own(shipped("tools_as_text"), None)
