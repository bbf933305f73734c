"""No conversation is learned wrongly with any form of template; docs/templates.md shows which are refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render.forms import without_reasoning
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.data.render.turns import Supervision
from tests.unit.data.render.dialogues import DIALOGUES, faults, words
from tests.unit.data.render.families import FAMILIES

TABLE = Path(__file__).parents[4] / "docs" / "templates.md"


def outcome(name: str, dialogue: str) -> tuple[list[str], str]:
    """What is wrong with the encoded dialogue, or why it is refused."""
    tokenizer = FAMILIES[name].tokenizer()
    messages, tools = DIALOGUES[dialogue]
    try:
        encoded = ChatTokenizer(tokenizer).encode_messages(messages, tools)
    except RowFault as fault:
        return [], fault.cause
    return faults(tokenizer, messages, tools, encoded, marks=name.startswith("marked")), ""


def row_of(name: str) -> str:
    """The row of a family in the table of the document."""
    cells = ["refused" if outcome(name, dialogue)[1] else "yes" for dialogue in DIALOGUES]
    return f"| {FAMILIES[name].form} | {' | '.join(cells)} |"


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_learned_wrongly(name: str, dialogue: str) -> None:
    assert outcome(name, dialogue)[0] == []


@pytest.mark.parametrize("dialogue", ["multi", "all_reasoning", "after_loop", "thinking_loop"])
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_learned_wrongly_of_single_turns(name: str, dialogue: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    messages, tools = DIALOGUES[dialogue]
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    try:
        rows = ChatTokenizer(tokenizer).encode_turns(messages, tools)
    except RowFault:
        return
    for turn, encoded in zip(turns, rows, strict=True):
        given = [{**m, "weight": 0} if i in turns and i != turn else m for i, m in enumerate(messages[: turn + 1])]
        assert faults(tokenizer, given, tools, encoded, marks=name.startswith("marked")) == []


@pytest.mark.parametrize("dialogue", DIALOGUES)
@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_is_learned_wrongly_without_reasoning(name: str, dialogue: str) -> None:
    tokenizer = FAMILIES[name].tokenizer()
    messages, tools = DIALOGUES[dialogue]
    try:
        encoded = ChatTokenizer(tokenizer, Supervision(reasoning="drop")).encode_messages(messages, tools)
    except RowFault:
        return
    assert faults(tokenizer, without_reasoning(messages), tools, encoded, marks=name.startswith("marked")) == []


def test_keys_train_what_is_refused_without_them() -> None:
    """Rows whose refusal names a key are trained with it."""

    def trains(name: str, dialogue: str, **settings: Any) -> bool:
        messages, tools = DIALOGUES[dialogue]
        try:
            ChatTokenizer(FAMILIES[name].tokenizer(), Supervision(**settings)).encode_messages(messages, tools)
        except RowFault:
            return False
        return True

    for name, dialogue, settings in (
        ("last_thought", "all_reasoning", {"train_on": "last"}),
        ("last_thought", "all_reasoning", {"reasoning": "keep"}),
        ("channels", "multi", {"train_on": "last"}),
        ("cut_thought", "all_reasoning", {"train_on": "last"}),
        ("chatml", "reasoning", {"reasoning": "inline"}),
        ("chatml", "reasoning", {"reasoning": "drop"}),
    ):
        assert not trains(name, dialogue) and trains(name, dialogue, **settings), (name, dialogue, settings)
    tokenizer = ChatTokenizer(FAMILIES["channels"].tokenizer())
    assert len(tokenizer.encode_turns(DIALOGUES["multi"][0])) == 2


def test_the_oracle_sees_what_is_wrong() -> None:
    tokenizer = FAMILIES["chatml"].tokenizer()
    messages, tools = DIALOGUES["after_loop"]
    encoded = ChatTokenizer(tokenizer).encode_messages(messages, tools)
    ids, labels = encoded["input_ids"], encoded["labels"]
    learned = [i for i, label in enumerate(labels) if label != IGNORED_LABEL]
    assert faults(tokenizer, messages, tools, encoded) == []

    def found(changed: dict[int, int], of: list[int] = labels) -> str:
        new = [changed.get(i, label) for i, label in enumerate(of)]
        return " ".join(faults(tokenizer, messages, tools, {"input_ids": ids, "labels": new}))

    assert "words of an answer are not learned" in found(dict.fromkeys(learned[-30:-2], IGNORED_LABEL))
    assert "between the prompt and the end" in found({learned[3]: IGNORED_LABEL})
    assert "no end token" in found({learned[-1]: IGNORED_LABEL})
    first = max(i for i in learned if i - 1 not in learned)
    assert "end of the prompt is learned" in found({first - 1: ids[first - 1]})
    assert "no answer are learned" in found({}, ids) and "behind the end token" in found({}, ids)
    more = [{"role": "system", "content": words(5)}, *messages]
    assert "words are not rendered" in " ".join(faults(tokenizer, more, tools, encoded))


def test_the_document_has_every_form() -> None:
    head = ["| form of the template | " + " | ".join(name.replace("_", " ") for name in DIALOGUES) + " |"]
    rows = [*head, "| --- |" + " --- |" * len(DIALOGUES), *(row_of(name) for name in FAMILIES)]
    assert "\n".join(rows) in TABLE.read_text(encoding="utf-8"), "\n".join(rows)
