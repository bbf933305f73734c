"""Supervised tokens of conversations, pairs and texts; expected strings are hand-written."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.errors import RequestError
from tests.unit.data.render.chats import (
    CHAT,
    CHATML,
    CORPUS,
    GEMMA,
    MISTRAL,
    SPECIAL,
    encode,
    make_tokenizer,
    marked,
    shipped,
)
from tests.unit.data.render.dialogues import DIALOGUES, faults


def test_messages_before_context_carry_no_loss() -> None:
    tokenizer = make_tokenizer(MISTRAL)
    encoded = ChatTokenizer(tokenizer).encode_messages(CHAT, context=2)
    assert marked(tokenizer, encoded) == (
        "<s>[INST] Hello there [/INST] How are you?</s>[INST] I am well [/INST]⟦ It is Paris.</s>⟧"
    )


NEWLINE = "{{ '\\n' }}"


END = "{% endgeneration %}"


MARKED_CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}"
    f"{{% generation %}}{{{{ m.content }}}}<|im_end|>{END}{NEWLINE}"
    "{% else %}{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.mark.parametrize(
    "ending", [f"<|im_end|>{END}{NEWLINE}", f"{END}<|im_end|>{NEWLINE}", f"<|im_end|>{NEWLINE}{END}"]
)
def test_generation_marks_are_used_up_to_the_end_token(ending: str) -> None:
    tokenizer = make_tokenizer(MARKED_CHATML.replace(f"<|im_end|>{END}{NEWLINE}", ending))
    encoded = ChatTokenizer(tokenizer).encode_messages(CHAT)
    assert marked(tokenizer, encoded) == (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n"
        "<|im_start|>user\nI am well<|im_end|>\n<|im_start|>assistant\n⟦It is Paris.<|im_end|>⟧\n"
    )


def test_prefix_difference_gives_transformers_own_mask_where_there_are_marks() -> None:
    tokenizer = make_tokenizer(MARKED_CHATML)
    options = {"tokenize": True, "return_dict": True, "return_assistant_tokens_mask": True}
    oracle = tokenizer.apply_chat_template(CHAT, **options)
    tokenizer.chat_template = MARKED_CHATML.replace("{% generation %}", "").replace(END, "")
    encoded = ChatTokenizer(tokenizer).encode_messages(CHAT)
    assert encoded["input_ids"] == oracle["input_ids"]
    assert [int(label != IGNORED_LABEL) for label in encoded["labels"]] == oracle["assistant_masks"]
    assert sum(oracle["assistant_masks"]) > 0


def test_bos_and_eos_stand_once() -> None:
    doubled = "{{ bos_token }}" + MISTRAL
    chat = [CHAT[0], {"role": "assistant", "content": "It is Paris.</s>"}]
    assert encode(doubled, chat, adds_bos=True) == "<s>[INST] Hello there [/INST]⟦ It is Paris.</s>⟧"


@pytest.mark.parametrize(
    ("chat", "cause"),
    [
        ([CHAT[0]], "no assistant turn"),
        ([CHAT[0], {"role": "assistant", "content": "  "}], "turns are empty"),
        ([CHAT[1], CHAT[0]], "starts with an assistant turn"),
        ([{"role": "system", "content": "x"}, *CHAT], "cannot render the row: System role not supported"),
        ([CHAT[0], {"role": "assistant", "content": "", "tool_calls": [
            {"type": "function", "function": {"name": "look_up", "arguments": {}}}]}], "does not render tool calls"),
    ],
)  # fmt: skip
def test_rows_that_teach_nothing_are_refused_by_cause(chat: list[dict[str, Any]], cause: str) -> None:
    with pytest.raises(RowFault, match=cause):
        encode(GEMMA, chat)


def test_tools_that_a_template_does_not_show_are_refused() -> None:
    tools = [{"type": "function", "function": {"name": "look_up", "parameters": {}}}]
    with pytest.raises(RowFault, match="does not render the row's tools"):
        ChatTokenizer(make_tokenizer(CHATML)).encode_messages(CHAT, tools)


def test_chatml_shows_tools_and_supervises_calls() -> None:
    tokenizer = make_tokenizer(shipped("chatml"))
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}
    chat = [
        {"role": "system", "content": "Be kind"},
        CHAT[0],
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "42"},
        CHAT[3],
    ]
    tools = [{"type": "function", "function": {"name": "look_up"}}]
    text = marked(tokenizer, ChatTokenizer(tokenizer).encode_messages(chat, tools))
    head, tail = text.split("<|im_start|>user\nHello there<|im_end|>\n")
    assert head.startswith("<|im_start|>system\nBe kind\n\n") and '"name": "look_up"' in head and "⟦" not in head
    assert tail == (
        '<|im_start|>assistant\n⟦<tool_call>\n{"name": "look_up", "arguments": {"city": "Paris"}}\n</tool_call>'
        "<|im_end|>⟧\n<|im_start|>user\n<tool_response>\n42\n</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n⟦It is Paris.<|im_end|>⟧\n"
    )


def test_messages_without_any_template_name_the_way_out() -> None:
    with pytest.raises(RequestError, match="no chat template") as caught:
        encode(None, CHAT)
    assert "task.chat_template=chatml" in caught.value.problems[0].way_out


@pytest.mark.parametrize("adds_bos", [False, True])
def test_pairs_and_text_have_one_bos_and_a_supervised_eos(adds_bos: bool) -> None:
    tokenizer = make_tokenizer(None, adds_bos=adds_bos)
    chat, bos = ChatTokenizer(tokenizer), "<s>" if adds_bos else ""
    assert marked(tokenizer, chat.encode_pair("What is it?", " It is Paris.")) == f"{bos}What is it?⟦ It is Paris.</s>⟧"
    assert marked(tokenizer, chat.encode_pair("<s>Hi", "you</s>")) == "<s>Hi⟦you</s>⟧"
    assert marked(tokenizer, chat.encode_pair("", "you")) == f"{bos}⟦you</s>⟧"
    assert tokenizer.decode(chat.encode_text("It is Paris.")["input_ids"]) == f"{bos}It is Paris.</s>"
    text = chat.encode_text("It is")
    assert text["input_ids"] == text["labels"]


def test_prompt_tokens_are_those_of_the_prompt_alone() -> None:
    tokenizer = make_tokenizer(None)
    for prompt, completion in (("What is the cap", "ital"), ("It is P", "aris."), ("Hello", " there")):
        encoded = ChatTokenizer(tokenizer).encode_pair(prompt, completion)
        alone = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        assert encoded["input_ids"][: len(alone)] == alone
        assert encoded["labels"][: len(alone)] == [IGNORED_LABEL] * len(alone)
        assert tokenizer.decode(encoded["input_ids"]) == f"{prompt}{completion}</s>"


def test_characters_of_several_tokens_and_a_tokenizer_without_offsets_give_the_same(monkeypatch: Any) -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "Ö 🙂 ça va"}]
    tokenizer = make_tokenizer(CHATML)
    by_offsets = ChatTokenizer(tokenizer).encode_messages(chat)
    assert marked(tokenizer, by_offsets).endswith("⟦Ö 🙂 ça va<|im_end|>⟧\n")
    monkeypatch.setattr(type(tokenizer), "is_fast", property(lambda self: False))
    assert ChatTokenizer(tokenizer).encode_messages(chat) == by_offsets


def test_sentencepiece_like_pieces_are_supervised_whole() -> None:
    tokenizer = Tokenizer(models.BPE(byte_fallback=False, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=list(SPECIAL), show_progress=False)
    tokenizer.train_from_iterator([*CORPUS, "User: Bot: \n"] * 4, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    fast.chat_template = MISTRAL
    encoded = ChatTokenizer(fast).encode_messages(CHAT)
    supervised = [t for t, label in zip(encoded["input_ids"], encoded["labels"], strict=True) if label != IGNORED_LABEL]
    assert fast.decode(supervised).replace("▁", " ").split("</s>") == ["How are you?", " It is Paris.", ""]


def test_an_end_token_in_a_generation_block_of_its_own_belongs_to_the_turn() -> None:
    block = f"{{{{ m.content }}}}{END}{NEWLINE}{{% generation %}}<|im_end|>{END}"
    tokenizer = make_tokenizer(MARKED_CHATML.replace(f"{{{{ m.content }}}}<|im_end|>{END}", block))
    assert marked(tokenizer, ChatTokenizer(tokenizer).encode_messages(CHAT)) == (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦How are you?⟧\n⟦<|im_end|>⟧\n"
        "<|im_start|>user\nI am well<|im_end|>\n<|im_start|>assistant\n⟦It is Paris.⟧\n⟦<|im_end|>⟧\n"
    )


def test_white_space_behind_tokens_of_a_turn_is_learned_with_generation_marks_too() -> None:
    tokenizer = make_tokenizer(MARKED_CHATML)
    answer = "[INST]\nIt is[/INST]\nParis."
    encoded = ChatTokenizer(tokenizer).encode_messages([CHAT[0], {"role": "assistant", "content": answer}])
    assert marked(tokenizer, encoded).endswith(f"<|im_start|>assistant\n⟦{answer}<|im_end|>⟧\n")


def test_the_header_of_a_turn_is_not_learned_if_the_prompt_has_it() -> None:
    header = "<|im_start|>{{ m.role }}\n{% if m.role == 'assistant' %}{% generation %}"
    inside = "{% if m.role == 'assistant' %}{% generation %}<|im_start|>assistant\n"
    template = MARKED_CHATML.replace(header, inside).replace("{% else %}", "{% else %}<|im_start|>{{ m.role }}\n")
    tokenizer, plain = make_tokenizer(template), make_tokenizer(MARKED_CHATML)
    assert ChatTokenizer(tokenizer).encode_messages(CHAT) == ChatTokenizer(plain).encode_messages(CHAT)


@pytest.mark.parametrize("dialogue", DIALOGUES)
def test_the_shipped_template_renders_every_part_of_a_row(dialogue: str) -> None:
    messages, tools = DIALOGUES[dialogue]
    tokenizer = make_tokenizer(shipped("chatml"), eos="<|im_end|>")
    assert faults(tokenizer, messages, tools, ChatTokenizer(tokenizer).encode_messages(messages, tools)) == []
