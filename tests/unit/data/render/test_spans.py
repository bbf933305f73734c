"""Supervised spans end where an assistant turn ends, whatever a template adds around it."""

from __future__ import annotations

import pytest

from dist_ft.data.read.faults import RowFault
from tests.unit.data.render.chats import (
    CHAT,
    CHATML,
    GEMMA,
    LLAMA3,
    MISTRAL,
    PLAIN,
    QWEN3,
    encode,
)


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
    with pytest.raises(RowFault, match="does not render the reasoning of an assistant message"):
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


def test_a_template_that_wants_content_in_parts_gets_it_so() -> None:
    template = CHATML.replace("{{ m.content }}", "{% for part in m.content %}{{ part.text }}{% endfor %}")
    assert encode(template, CHAT) == encode(CHATML, CHAT)


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
