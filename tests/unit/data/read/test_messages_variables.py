"""Rows may have variables of the chat template of their own, in the column that TRL reads."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.config.task import InstructionConfig
from dist_ft.data.read.faults import InvalidRow
from dist_ft.data.read.formats import normalise
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.task.batches.pairs import encode_pair
from dist_ft.task.instruction import Instruction
from tests.unit.data.render.dialogues import DIALOGUES, faults, said, user
from tests.unit.data.render.families import FAMILIES

OFF = {"enable_thinking": False}


@pytest.mark.parametrize("one_row_per_turn", [False, True])
def test_each_row_has_its_own_variables(one_row_per_turn: bool) -> None:
    """Answers with and without reasoning, of a template whose prompt depends on a variable."""
    tokenizer = FAMILIES["switch"].tokenizer()
    config = InstructionConfig(name="instruction", one_row_per_turn=one_row_per_turn)
    task = Instruction(config, padding_free=True)
    for dialogue, variables in (("plain", OFF), ("reasoning", {}), ("reasoning", {"enable_thinking": True})):
        messages, tools = DIALOGUES[dialogue]
        row = normalise({"messages": messages, "chat_template_kwargs": {**variables, "x": None}}, "messages", {})
        assert row == {"messages": messages, **({"chat_template_kwargs": variables} if variables else {})}
        (encoded,) = task.encode(row, ChatTokenizer(tokenizer))
        template, tokenizer.chat_template = tokenizer.chat_template, FAMILIES["switch"].template
        if variables == OFF:
            tokenizer.chat_template = "{% set enable_thinking = false %}\n" + template
        assert faults(tokenizer, messages, tools, encoded) == []
        tokenizer.chat_template = template


def test_pairs_have_them_too() -> None:
    tokenizer = ChatTokenizer(FAMILIES["switch"].tokenizer())
    pair = {"prompt": [user(1)], "chosen": [said(2)], "rejected": [said(3)]}
    row = normalise({**pair, "chat_template_kwargs": '{"enable_thinking": false}'}, "pairs", {})
    assert encode_pair(row, tokenizer)[0] == tokenizer.encode_messages([user(1), said(2)], variables=OFF)


@pytest.mark.parametrize(
    ("value", "rule"), [(["x"], "must be an object"), ({"tools": []}, "has tools, which other columns determine")]
)
def test_what_is_no_variable_is_refused(value: Any, rule: str) -> None:
    with pytest.raises(InvalidRow, match=rule):
        normalise({"messages": [user(1), said(2)], "chat_template_kwargs": value}, "messages", {})
