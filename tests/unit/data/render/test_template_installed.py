"""No conversation is learned wrongly with the chat templates that come with TRL, which are those of current models."""

from __future__ import annotations

import importlib.util
import re
from collections import Counter
from pathlib import Path

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.template import ChatTokenizer
from tests.unit.data.render.dialogues import DIALOGUES, faults
from tests.unit.data.render.families import Family

TOKEN = re.compile(
    r"<\|[^<>\s'\"{}]{1,40}\|?>|<[^<>\s'\"{}|%=]{1,30}\|>|<｜[^<>\s]{1,40}｜>|</?[a-z_]{2,25}>|\[/?[A-Z_]{2,20}\]"
)
ENDS = (
    "<|END_OF_TURN_TOKEN|>",
    "<|im_end|>",
    "<|eot_id|>",
    "<｜end▁of▁sentence｜>",
    "<|return|>",
    "<|eot|>",
    "<|end|>",
)


def templates() -> list[Path]:
    """The chat templates of the installed package."""
    found = importlib.util.find_spec("trl")
    return sorted(Path(found.origin or "").parent.glob("chat_templates/*.jinja")) if found else []


def family_of(path: Path) -> Family:
    """A template with the tokens that it names, and the end token of a turn, or one that it does not name."""
    template = path.read_text(encoding="utf-8")
    tokens = sorted(set(TOKEN.findall(template)))
    return Family(path.stem, template, tuple(tokens), next((end for end in ENDS if end in tokens), "</s>"))


@pytest.mark.slow
@pytest.mark.skipif(not templates(), reason="TRL, whose chat templates are read, is not installed")
def test_nothing_is_learned_wrongly_with_the_templates_of_trl() -> None:
    wrong, counts = {}, Counter[str]()
    for path in templates():
        family = family_of(path)
        tokenizer = family.tokenizer()
        for name, (messages, tools) in DIALOGUES.items():
            try:
                encoded = ChatTokenizer(tokenizer).encode_messages(messages, tools)
            except RowFault:
                continue
            counts[path.stem] += 1
            if found := faults(tokenizer, messages, tools, encoded, marks="generation" in family.template):
                wrong[path.stem, name] = found
    assert wrong == {}
    assert counts.total() > 9 * len(templates())
