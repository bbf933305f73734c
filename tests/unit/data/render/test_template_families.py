"""No conversation is learned wrongly with any form of template; docs/templates.md shows which are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render.template import ChatTokenizer
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
