"""Tests of the supervised tokens with chat templates of common model families; expected strings are hand-written."""

from __future__ import annotations

from typing import Any

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.data.render.template_file import CHATML_FILE
from dist_ft.errors import RequestError

CHATML = (
    "{% for m in messages %}"
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}"
    "<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"
    "{{ m.content | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
QWEN3 = (  # renders a thinking block only in the last answer, even if the block is empty
    "{% for m in messages %}{% if m.role == 'assistant' %}"
    "{% set parts = m.content.split('</think>') %}{% set thought = parts[0].split('<think>')[-1].strip('\n') %}"
    "<|im_start|>assistant\n"
    "{% if loop.last %}<think>\n{{ thought if parts | length > 1 else '' }}\n</think>\n\n{% endif %}"
    "{{ parts[-1].lstrip('\n') }}<|im_end|>\n"
    "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PLAIN = (
    "{% for m in messages %}{{ 'User: ' if m.role == 'user' else 'Bot: ' }}{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}Bot: {% endif %}"
)
SPECIAL = (
    "<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>", "[INST]", "[/INST]",
)  # fmt: skip
CORPUS = ["Hello there, how are you today?", "I am well, thank you.", "What is the capital of France?", "It is Paris."]

CHAT = [
    {"role": "user", "content": "Hello there"},
    {"role": "assistant", "content": "How are you?"},
    {"role": "user", "content": "I am well"},
    {"role": "assistant", "content": "It is Paris."},
]


def make_tokenizer(template: str | None, *, eos: str | None = "</s>", adds_bos: bool = False) -> Any:
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=400, special_tokens=list(SPECIAL), initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator(CORPUS * 4, trainer)
    if adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", SPECIAL.index("<s>"))]
        )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<s>", eos_token=eos, unk_token="<unk>")
    tokenizer.chat_template = template
    return tokenizer


def marked(tokenizer: Any, encoded: dict[str, list[int]]) -> str:
    """Decode the tokens, with supervised runs enclosed in ⟦ ⟧."""
    ids, labels = encoded["input_ids"], encoded["labels"]
    assert len(ids) == len(labels)
    assert all(label in (token, IGNORED_LABEL) for token, label in zip(ids, labels, strict=True))
    text, previous, run = "", False, []
    for token, label in [*zip(ids, labels, strict=True), (None, IGNORED_LABEL)]:
        supervised = label != IGNORED_LABEL
        if run and (supervised != previous or token is None):
            piece = tokenizer.decode(run)
            text, run = text + (f"⟦{piece}⟧" if previous else piece), []
        run.append(token)
        previous = supervised
    return text


def encode(template: str | None, messages: list[dict[str, Any]], **options: Any) -> str:
    tokenizer = make_tokenizer(template, **options)
    return marked(tokenizer, ChatTokenizer(tokenizer).encode_messages(messages))


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (
            CHATML,
            (
                "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n"
                "<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n<|im_start|>user\nI am well<|im_end|>\n"
                "<|im_start|>assistant\n⟦It is Paris.<|im_end|>⟧\n"
            ),
        ),
        (
            LLAMA3,
            (
                "<s><|start_header_id|>user<|end_header_id|>\n\nHello there<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦How are you?<|eot_id|>⟧"
                "<|start_header_id|>user<|end_header_id|>\n\nI am well<|eot_id|>"
                "<|start_header_id|>assistant<|end_header_id|>\n\n⟦It is Paris.<|eot_id|>⟧"
            ),
        ),
        (
            GEMMA,
            (
                "<s><start_of_turn>user\nHello there<end_of_turn>\n<start_of_turn>model\n⟦How are you?<end_of_turn>⟧\n"
                "<start_of_turn>user\nI am well<end_of_turn>\n<start_of_turn>model\n⟦It is Paris.<end_of_turn>⟧\n"
            ),
        ),
        (
            MISTRAL,
            "<s>[INST] Hello there [/INST]⟦ How are you?</s>⟧[INST] I am well [/INST]⟦ It is Paris.</s>⟧",
        ),
        (
            QWEN3,
            (
                "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n"
                "<|im_start|>user\nI am well<|im_end|>\n"
                "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nIt is Paris.<|im_end|>⟧\n"
            ),
        ),
        (PLAIN, "User: Hello there\nBot: ⟦How are you?\n⟧User: I am well\nBot: ⟦It is Paris.</s>⟧"),
    ],
    ids=["chatml", "llama3", "gemma", "mistral", "qwen3", "plain"],
)
@pytest.mark.parametrize("adds_bos", [False, True])
def test_assistant_turns_and_their_end_tokens_are_supervised(template: str, expected: str, adds_bos: bool) -> None:
    assert encode(template, CHAT, adds_bos=adds_bos) == expected


def test_white_space_that_a_template_strips_is_no_part_of_a_span() -> None:
    chat = [{"role": "user", "content": " Hello "}, {"role": "assistant", "content": "\n It is Paris. \n"}]
    assert encode(GEMMA, chat) == (
        "<s><start_of_turn>user\nHello<end_of_turn>\n<start_of_turn>model\n⟦It is Paris.<end_of_turn>⟧\n"
    )


def test_the_last_turns_thinking_is_supervised_and_an_earlier_one_that_is_dropped_is_refused() -> None:
    thinking = {"role": "assistant", "content": "<think>\nHm\n</think>\n\nIt is Paris."}
    assert encode(QWEN3, [CHAT[0], thinking]).endswith("⟦<think>\nHm\n</think>\n\nIt is Paris.<|im_end|>⟧\n")
    with pytest.raises(RowFault, match="changes the content of earlier assistant turns"):
        encode(QWEN3, [CHAT[0], thinking, *CHAT[2:]])


def test_a_generation_prompt_unlike_what_follows_is_refused() -> None:
    template = CHATML.replace("<|im_start|>assistant\n{% endif", "<|im_start|>assistant\n<think>\n{% endif")
    with pytest.raises(RowFault, match="generation prompt"):
        encode(template, CHAT)


PHI3 = (  # appends EOS after the whole conversation
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% else %}{{ eos_token }}{% endif %}"
)


GPT_OSS = (  # ends the last answer with another token than earlier answers
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    "{{ eos_token if loop.last and m.role == 'assistant' else '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def test_an_eos_behind_the_conversation_is_no_end_of_earlier_turns() -> None:
    assert encode(PHI3, CHAT).endswith(
        "⟦How are you?<|im_end|>⟧\n<|im_start|>user\nI am well<|im_end|>\n"
        "<|im_start|>assistant\n⟦It is Paris.<|im_end|>\n</s>⟧"
    )
    with pytest.raises(RowFault, match="ends earlier assistant turns with other tokens"):
        encode(GPT_OSS, CHAT)
    assert encode(GPT_OSS, CHAT[:2]).endswith("⟦How are you?</s>⟧")


def test_an_empty_thinking_block_of_the_generation_prompt_is_context() -> None:
    """As in Qwen 3.5, the generation prompt contains an empty thinking block, which only the last turn renders."""
    block = "<think>\n\n</think>\n\n"
    template = QWEN3.replace("assistant\n{% endif %}", f"assistant\n{block}{{% endif %}}")
    assert encode(template, CHAT) == (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n⟦How are you?<|im_end|>⟧\n"
        f"<|im_start|>user\nI am well<|im_end|>\n<|im_start|>assistant\n{block}⟦It is Paris.<|im_end|>⟧\n"
    )


def test_a_template_that_wants_content_in_parts_shows_no_words() -> None:
    template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    with pytest.raises(RowFault, match="does not render the assistant's content"):
        encode(template, CHAT)


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


def test_an_end_token_that_only_comes_with_the_next_turn_belongs_to_the_turn() -> None:
    template = (
        "{% for m in messages %}{% if not loop.first %}{{ eos_token }}{% endif %}"
        "{{ m.role }}: {{ m.content }}{% endfor %}"
        "{% if add_generation_prompt %}{{ eos_token }}assistant: {% endif %}"
    )
    assert encode(template, CHAT) == (
        "user: Hello there</s>assistant: ⟦How are you?</s>⟧user: I am well</s>assistant: ⟦It is Paris.</s>⟧"
    )


def test_a_token_that_takes_the_prompts_last_space_is_supervised_whole() -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "there"}]
    assert encode(PLAIN, chat) == "User: Hello there\nBot:⟦ there</s>⟧"


def test_a_template_without_end_tokens_needs_an_eos() -> None:
    with pytest.raises(RowFault, match="renders no end token after an assistant turn"):
        encode(PLAIN, CHAT, eos=None)
    with pytest.raises(RowFault, match="more messages follow"):
        encode(PLAIN, CHAT[:3])


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
    tokenizer = make_tokenizer(CHATML_FILE.read_text(encoding="utf-8"))
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
