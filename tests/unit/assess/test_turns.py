"""Tests that prompts are rendered as in training and that answers end at the same token as in training."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from dist_ft.assess.turns import Question, question_of, read_questions, speaks_chat
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


CALL = {"type": "function", "function": {"name": "look_up", "arguments": {"q": "x"}}}


def test_a_prompt_is_rendered_as_the_row_was_in_training(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}{{ m.weight }}: {{ m.content }}"
        "{% for c in m.tool_calls or [] %}{{ c.function.name + c.function.arguments }}{% endfor %};{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    said = [{"role": "user", "content": "Hi", "weight": 1}, {"role": "assistant", "content": "", "tool_calls": [CALL]}]
    ids = Question([*said, said[0]], "").encode(tokenizer)
    assert tokenizer.decode(ids) == 'user: Hi;assistant: look_up{"q": "x"};user: Hi;assistant: '
    tokenizer.chat_template = "{{ messages[0].content }}{{ name }}"
    assert tokenizer.decode(Question(said, "", variables={"name": " x"}).encode(tokenizer)) == "Hi x"
    row = {"messages": [*said, said[0]], "chat_template_kwargs": {"name": " x"}}
    assert question_of(row, "").variables == {"name": " x"}
    tokenizer.chat_template = "{{ raise_exception('no') }}"
    with pytest.raises(RequestError, match="the chat template cannot render the row: no"):
        Question(said, "").encode(tokenizer)


def test_a_prompt_has_the_switch_with_which_its_row_is_trained(tiny_tokenizer: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_tokenizer)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role }}:"
        "{% if m.role == 'assistant' %}{{ '<yes>' + m.thinking if m.thinking else '<no>' }}{% endif %}"
        "{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}assistant:"
        "{{ '<yes>' if enable_thinking is not defined or enable_thinking else '<no>' }}{% endif %}"
    )
    said = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
    for answer, ending in ((said[1], "assistant:<no>"), ({**said[1], "thinking": "Hm"}, "assistant:<yes>")):
        question = question_of({"messages": [said[0], answer]}, "")
        assert tokenizer.decode(question.encode(tokenizer)).endswith(ending)


def test_reasoning_that_was_dropped_in_training_is_in_no_prompt(tmp_path: Path) -> None:
    thought = {"role": "assistant", "content": "<think>Hm</think>two", "thinking": "Hm"}
    said = [{"role": "user", "content": "one"}, thought, {"role": "user", "content": "three"}, thought]
    (tmp_path / "rows.jsonl").write_text(json.dumps({"messages": said}))
    words = ["data=jsonl", f"data.train={tmp_path / 'rows.jsonl'}"]
    for reasoning, content in (("drop", "two"), ("require", "<think>Hm</think>two")):
        (question,) = read_questions(compose([*words, f"task.reasoning={reasoning}"]).config, "train", 1)
        assert question.messages is not None and question.messages[1]["content"] == content
        assert ("thinking" in question.messages[1]) is (reasoning == "require")


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
