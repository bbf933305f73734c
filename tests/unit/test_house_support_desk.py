"""Tests of the support_desk data set: well formed, consistent, balanced, and no row in two splits."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "dist_ft" / "data" / "support_desk"
SIZES = {"train": 360, "validation": 45, "test": 45}
TEAMS = {"billing": "ledger", "delivery": "parcel", "returns": "swap", "technical": "bench", "account": "key"}
PROMISES = {
    "high": "is on it now and calls you within the hour.",
    "normal": "answers you by tomorrow evening.",
    "low": "writes to you before the week is out.",
}
ANSWERS = {
    f"team: {team} | urgency: {urgency}\nreply: The {desk} desk {promise}"
    for (team, desk), (urgency, promise) in itertools.product(TEAMS.items(), PROMISES.items())
}


def rows(split: str) -> list[tuple[str, str]]:
    lines = (FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    messages = [json.loads(line)["messages"] for line in lines]
    assert all([m["role"] for m in turns] == ["user", "assistant"] for turns in messages)
    return [(turns[0]["content"], turns[1]["content"]) for turns in messages]


@pytest.mark.parametrize("split", SIZES)
def test_rows_are_short_and_answers_are_of_the_house(split: str) -> None:
    found = rows(split)
    assert len(found) == SIZES[split]
    for question, answer in found:
        assert 3 <= len(question.split()) <= 45, question
        assert question == question.strip()
        assert answer in ANSWERS, answer


@pytest.mark.parametrize("split", SIZES)
def test_every_answer_is_equally_frequent(split: str) -> None:
    assert set(Counter(answer for _, answer in rows(split)).values()) == {SIZES[split] // len(ANSWERS)}


def test_no_question_resembles_another() -> None:
    bags = [(set(re.findall(r"[a-z0-9']+", q.lower())), q) for split in SIZES for q, _ in rows(split)]
    alike = [(q, r) for (a, q), (b, r) in itertools.combinations(bags, 2) if len(a & b) > 0.4 * len(a | b)]
    assert not alike
