"""Which turns and end tokens are supervised: flags of messages, roles, and what becomes of reasoning."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.messages import messages_of_sharegpt
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.data.render.template_file import with_defaults
from dist_ft.data.render.turns import Supervision
from tests.unit.data.render.chats import CHAT, CHATML, MISTRAL, PLAIN, QWEN3, make_tokenizer, marked

PLAIN_CHATML = CHATML.replace(
    "{% if loop.first and m.role != 'system' %}<|im_start|>system\nBe kind<|im_end|>\n{% endif %}", ""
)
WHOLE = (
    "<|im_start|>user\n{0}Hello there{1}<|im_end|>{2}\n<|im_start|>assistant\n{3}How are you?{4}<|im_end|>{5}\n"
    "<|im_start|>user\n{6}I am well{7}<|im_end|>{8}\n<|im_start|>assistant\n{9}It is Paris.{10}<|im_end|>{11}\n"
)


def learned(*turns: int, ends: tuple[int, ...] | None = None) -> str:
    """The conversation with these turns supervised, and with the end tokens of those in `ends` (default: all)."""
    signs = [""] * 12
    for turn in turns:
        has_end = ends is None or turn in ends
        signs[3 * turn], signs[3 * turn + (2 if has_end else 1)] = "⟦", "⟧"
    return WHOLE.format(*signs)


def encoded(messages: list[dict[str, Any]], template: str = PLAIN_CHATML, **settings: Any) -> str:
    """The encoded conversation as a string."""
    tokenizer = make_tokenizer(template)
    return marked(tokenizer, ChatTokenizer(tokenizer, Supervision(**settings)).encode_messages(messages))


def flagged(**flags: dict[int, Any]) -> list[dict[str, Any]]:
    """The conversation with these flags of messages."""
    chat = [dict(message) for message in CHAT]
    for name, values in flags.items():
        for turn, value in values.items():
            chat[turn][name] = value
    return chat


@pytest.mark.parametrize("name", ["weight", "loss", "train"])
@pytest.mark.parametrize("off", [0, False, 0.0])
def test_a_flag_of_a_message_says_whether_it_is_supervised(name: str, off: Any) -> None:
    assert encoded(flagged(**{name: {1: off}})) == learned(3)
    assert encoded(flagged(**{name: {3: off}})) == learned(1)
    assert encoded(flagged(**{name: {1: 1, 3: True}})) == learned(1, 3)
    assert encoded(flagged(**{name: {0: 1}})) == learned(0, 1, 3)
    with pytest.raises(RowFault, match="no turn is marked for training"):
        encoded(flagged(**{name: {1: off, 3: off}}))


def test_flags_that_are_no_yes_or_no_are_refused() -> None:
    with pytest.raises(RowFault, match=r"the weight of a message is 0\.5, neither 0 nor 1"):
        encoded(flagged(weight={1: 0.5}))
    with pytest.raises(RowFault, match="of a message differ"):
        encoded(flagged(weight={1: 0}, train={1: True}))


@pytest.mark.parametrize("template", [MISTRAL, QWEN3])
def test_flags_reach_no_template(template: str) -> None:
    shown = template.replace("{{ m.content }}", "{{ m.content }}{{ m.weight }}")
    assert encoded(flagged(weight={1: 1, 3: 1}), shown) == encoded(CHAT, template)


def test_turns_of_sharegpt_have_flags_too() -> None:
    turns = [
        {"from": "human", "value": "Hello there"},
        {"from": "gpt", "value": "How are you?", "weight": 0},
        {"from": "human", "value": "I am well", "loss": None},
        {"from": "gpt", "value": "It is Paris.", "weight": 1},
    ]
    assert encoded(messages_of_sharegpt({"conversations": turns})) == learned(3)


@pytest.mark.parametrize(
    ("train_on", "turns"),
    [("assistant", (1, 3)), ("last", (3,)), (["user"], (0, 2)), (["assistant", "user"], (0, 1, 2, 3))],
)
def test_turns_are_chosen_by_role(train_on: Any, turns: tuple[int, ...]) -> None:
    assert encoded(CHAT, train_on=train_on) == learned(*turns)


def test_a_flag_takes_precedence_over_the_roles() -> None:
    assert encoded(flagged(train={2: True, 3: False}), train_on=["assistant"]) == learned(1, 2)
    assert encoded(flagged(train={1: True}), train_on="last") == learned(3)


def test_of_all_everything_is_learned_except_what_is_flagged() -> None:
    assert encoded(CHAT, train_on="all") == f"⟦{learned().rstrip()}⟧\n"
    head, tail = learned().rstrip().split("I am well")
    assert encoded(flagged(weight={2: 0}), train_on="all") == f"⟦{head}⟧I am well⟦{tail}⟧\n"


@pytest.mark.parametrize(("ends", "which"), [("turn", (1, 3)), ("last", (3,)), ("none", ())])
def test_end_tokens_are_learned_as_set(ends: Any, which: tuple[int, ...]) -> None:
    assert encoded(CHAT, train_on_eos=ends) == learned(1, 3, ends=which)


def test_an_appended_end_token_is_left_out_too() -> None:
    assert encoded(CHAT[:2], PLAIN) == "User: Hello there\nBot: ⟦How are you?</s>⟧"
    assert encoded(CHAT[:2], PLAIN, train_on_eos="none") == "User: Hello there\nBot: ⟦How are you?\n⟧"


THOUGHT = {"role": "assistant", "content": "It is Paris.", "reasoning_content": "Hm"}
INLINE = {"role": "assistant", "content": "<think>\nHm\n</think>\n\nIt is Paris."}


def test_reasoning_is_required_of_supervised_turns_alone() -> None:
    with pytest.raises(RowFault, match="reasoning of an assistant message"):
        encoded([CHAT[0], THOUGHT])
    earlier = {**THOUGHT, "weight": 0}
    assert encoded([CHAT[0], earlier, CHAT[2], CHAT[3]]).count("⟦") == 1


@pytest.mark.parametrize("answer", [THOUGHT, {**THOUGHT, "reasoning_content": None, "reasoning": "Hm"}, INLINE])
def test_reasoning_is_given_in_the_form_that_the_template_renders(answer: dict[str, Any]) -> None:
    expected = "⟦<think>\nHm\n</think>\n\nIt is Paris.<|im_end|>⟧\n"
    assert encoded([CHAT[0], answer], QWEN3).endswith(expected)
    named = "{% if m.NAME %}<think>\n{{ m.NAME }}\n</think>\n\n{% endif %}{{ m.content }}"
    for name in ("reasoning_content", "thinking", "reasoning"):
        template = PLAIN_CHATML.replace("{{ m.content }}", named.replace("NAME", name))
        assert encoded([CHAT[0], answer], template).endswith(expected), name


def test_reasoning_is_kept_or_dropped_as_set() -> None:
    chat = [CHAT[0], INLINE, CHAT[2], {**THOUGHT, "content": "Hm hm"}]
    assert encoded(chat, QWEN3, reasoning="keep").count("Hm\n</think>") == 1
    assert "⟦It is Paris.<|im_end|>⟧" in encoded(chat, QWEN3, reasoning="keep")
    assert "Hm\n</think>" not in encoded(chat, QWEN3, reasoning="drop")
    assert encoded([CHAT[0], THOUGHT], reasoning="drop") == encoded([CHAT[0], INLINE], reasoning="drop")


OPENS = PLAIN_CHATML.replace("assistant\n{% endif", "assistant\n<think>\n{% endif").replace(
    "{{ m.content }}", "{{ m.content.split('</think>')[-1] }}"
)


@pytest.mark.parametrize("answer", [THOUGHT, INLINE])
def test_reasoning_that_a_template_cuts_is_trained_behind_the_prompt_that_opens_it(answer: dict[str, Any]) -> None:
    assert encoded([CHAT[0], answer], OPENS) == (
        "<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n<think>\n"
        "⟦Hm\n</think>\n\nIt is Paris.<|im_end|>⟧\n"
    )
    with pytest.raises(RowFault, match="reasoning"):
        encoded([CHAT[0], answer, CHAT[2], answer], OPENS)


@pytest.mark.parametrize("reasoning", ["require", "drop"])
def test_an_answer_without_reasoning_closes_an_open_block(reasoning: str) -> None:
    expected = "<think>\n⟦\n</think>\n\nHow are you?<|im_end|>⟧\n"
    assert encoded(CHAT[:2], OPENS, reasoning=reasoning).endswith(expected)
    with pytest.raises(RowFault, match="generation prompt ends with") as caught:
        encoded(CHAT, OPENS, reasoning=reasoning)
    assert "task.one_row_per_turn=true" in caught.value.way_out


def test_reasoning_is_written_into_the_content_if_asked() -> None:
    block = "<think>\nHm\n</think>\n\n"
    answered = [CHAT[0], THOUGHT, CHAT[2], INLINE]
    with pytest.raises(RowFault, match="reasoning") as caught:
        encoded(answered)
    assert "task.reasoning=inline" in caught.value.way_out
    assert encoded(answered, reasoning="inline").count(f"⟦{block}It is Paris.<|im_end|>⟧") == 2


SWITCH = PLAIN_CHATML.replace(
    "{{ m.content }}",
    "{% if m.reasoning_content %}<think>\n{{ m.reasoning_content }}\n</think>\n\n{% elif m.role == 'assistant' %}"
    "<think></think>{% endif %}{{ m.content }}",
).replace(
    "assistant\n{% endif",
    "assistant\n{% if enable_thinking is not defined or enable_thinking %}{{ '<think>\n' }}{% else %}<think></think>"
    "{% endif %}{% endif",
)


def test_a_switch_is_set_as_the_answers_have_reasoning() -> None:
    assert encoded([CHAT[0], THOUGHT], SWITCH).endswith("<think>\n⟦Hm\n</think>\n\nIt is Paris.<|im_end|>⟧\n")
    assert encoded(CHAT, SWITCH).count("<think></think>⟦") == 2
    tokenizer = make_tokenizer(SWITCH)
    chat = ChatTokenizer(tokenizer)
    assert chat.variables_of(CHAT) == {"enable_thinking": False} and chat.variables_of([CHAT[0], THOUGHT]) == {}


def test_a_switch_that_is_set_stays() -> None:
    tokenizer = make_tokenizer(with_defaults(SWITCH, {"enable_thinking": True}))
    with pytest.raises(RowFault, match="generation prompt ends with"):
        ChatTokenizer(tokenizer).encode_messages(CHAT)
    with pytest.raises(RowFault, match="generation prompt ends with"):
        ChatTokenizer(make_tokenizer(SWITCH)).encode_messages(CHAT, variables={"enable_thinking": True})


BLOCK = "<|channel>thought\n<channel|>"


def test_an_answer_follows_the_empty_block_that_its_prompt_ends_with() -> None:
    """As in Gemma 4: the block is in no rendered answer, also not in one that starts with another token."""
    template = PLAIN_CHATML.replace("assistant\n{% endif", f"assistant\n{{{{ '{BLOCK}' }}}}{{% endif")
    shown = encoded(CHAT, template)
    assert shown.count(BLOCK) == 1 and shown.endswith(f"{BLOCK}⟦It is Paris.<|im_end|>⟧\n")
    assert "assistant\n⟦How are you?<|im_end|>⟧" in shown
    called = {"role": "assistant", "content": "<|channel>call"}
    assert encoded([CHAT[0], called], template).endswith(f"{BLOCK}⟦<|channel>call<|im_end|>⟧\n")


def test_what_a_developer_says_is_the_systems_where_the_template_has_no_such_role() -> None:
    deaf = "{% if m.role != 'developer' %}"
    template = PLAIN_CHATML.replace("<|im_start|>{{ m.role }}", deaf + "<|im_start|>{{ m.role }}").replace(
        "<|im_end|>\n{% endfor %}", "<|im_end|>\n{% endif %}{% endfor %}"
    )
    chat = [{"role": "developer", "content": "Be kind"}, *CHAT[:2]]
    assert encoded(chat).startswith("<|im_start|>developer\nBe kind<|im_end|>")
    assert encoded(chat, template) == encoded([{**chat[0], "role": "system"}, *chat[1:]], template)


def test_each_turn_is_a_conversation_of_its_own() -> None:
    tokenizer = make_tokenizer(QWEN3)
    chat = [CHAT[0], INLINE, CHAT[2], THOUGHT]
    rows = ChatTokenizer(tokenizer).encode_turns(chat)
    assert [marked(tokenizer, row) for row in rows] == [
        encoded(chat[:2], QWEN3),
        encoded([*chat[:1], {**INLINE, "weight": 0}, *chat[2:]], QWEN3),
    ]
    assert len(ChatTokenizer(tokenizer).encode_turns(chat, context=2)) == 1
