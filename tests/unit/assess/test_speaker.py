"""Answers that are shown while they are generated."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess.speaker import Speaker
from dist_ft.assess.turns import Question
from dist_ft.errors import RequestError
from dist_ft.process.options import GenerateOptions


@pytest.fixture
def speaker(tiny_llama: Path) -> Speaker:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    return Speaker("tuned", model, tokenizer, None, GenerateOptions(max_new_tokens=24, temperature=9.0))


def test_the_pieces_are_the_answer(speaker: Speaker) -> None:
    pieces: list[str] = []
    question = Question(None, "Refund my order")
    answer = speaker.answer(question, pieces.append)
    assert answer == speaker.answer(question)
    assert len(pieces) > 3
    assert "".join(pieces) == answer


def test_what_fits_is_what_is_answered(speaker: Speaker) -> None:
    speaker.model.config.max_position_embeddings = 30
    for words, fits in (("Refund", True), ("Refund my order " * 10, False)):
        question = Question(None, words)
        assert speaker.fits(question) is fits
        if not fits:
            with pytest.raises(RequestError, match="exceed the model's limit of 30"):
                speaker.answer(question)
