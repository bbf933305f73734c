"""Tests that prompts are rendered as in training and that answers end at the same token as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_ft.assess.turns import Question, question_of, speaks_chat
from dist_ft.config.task import CausalLMConfig, InstructionConfig, PreferenceConfig
from dist_ft.data.render.template import find_end_token
from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import compose

TASK = InstructionConfig(name="instruction")


def test_a_chat_prompt_is_the_template_s(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    ids = Question.of_text("Hello", chat=True).encode(tokenizer)
    assert tokenizer.decode(ids) == "<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(Question.of_text("Hello", chat=False).encode(tokenizer)) == "Hello"


def test_a_plain_prompt_begins_with_bos_once(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer, bos_token="<|im_start|>")
    from tokenizers.processors import TemplateProcessing

    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        "<|im_start|> $0", special_tokens=[("<|im_start|>", 1)]
    )
    assert tokenizer("a")["input_ids"][0] == 1
    for text in ("Hello", "<|im_start|>Hello"):
        ids = Question.of_text(text, chat=False).encode(tokenizer)
        assert ids[0] == 1 and ids.count(1) == 1


def test_the_end_is_the_template_s_end_of_turn(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    assert find_end_token(tokenizer, TASK) == 2
    tokenizer.eos_token = "<|pad|>"  # end-of-text token of a base model
    assert find_end_token(tokenizer, TASK) == 2, "the template ends a turn with <|im_end|>"
    assert find_end_token(tokenizer, CausalLMConfig(name="causal_lm")) == 0
    assert find_end_token(None, TASK) is None


def test_pairs_of_messages_are_asked_in_chat_and_pairs_of_text_are_not(tiny_tokenizer: Path, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    assert find_end_token(tokenizer, PreferenceConfig(name="preference")) == 2
    rows = tmp_path / "rows.jsonl"
    for prompt, wanted in (("p", False), ([{"role": "user", "content": "p"}], True)):
        rows.write_text(json.dumps({"prompt": prompt, "chosen": "a", "rejected": "b"}), encoding="utf-8")
        config: Any = compose(["task=preference", "data=jsonl", f"data.train={rows}"]).config
        assert speaks_chat(config, tokenizer, ["pairs"]) is wanted


def test_rows_as_questions() -> None:
    said = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
        {"role": "assistant", "content": "four"},
    ]
    question = question_of({"messages": said}, "x")
    assert (list(question.messages or []), question.text, question.answer) == (said[:3], "three", "four")
    open_ended = question_of({"messages": said[:1]}, "x")
    assert (open_ended.text, open_ended.answer) == ("one", None)
    assert question_of({"prompt": "p", "completion": "c"}, "x") == Question(None, "p", "c")
    assert question_of({"prompt": "p", "chosen": "c", "rejected": "d"}, "x") == Question(None, "p", "c")
    pair = question_of({"prompt": said[:3], "chosen": said[3:], "rejected": said[1:2]}, "x")
    assert (list(pair.messages or []), pair.text, pair.answer) == (said[:3], "three", "four")
    assert question_of({"text": "a b c d"}, "x") == Question(None, "a b", "c d")
    with pytest.raises(RequestError, match="token ids instead of text"):
        question_of({"input_ids": [1], "labels": [1]}, "x")
