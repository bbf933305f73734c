"""The texts of a row are found at their own places in its rendering, or the row is refused with the part named."""

from __future__ import annotations

from typing import Any

import pytest
from transformers.utils import chat_template_utils

from dist_ft.data.read.faults import RowFault
from dist_ft.data.read.formats import IGNORED_LABEL
from dist_ft.data.render.places import find_places
from dist_ft.data.render.renderer import Renderer
from dist_ft.data.render.template import ChatTokenizer
from tests.unit.data.render.chats import CHAT, CHATML, make_tokenizer, marked
from tests.unit.data.render.dialogues import DIALOGUES
from tests.unit.data.render.families import FAMILIES


def cause(family: str, messages: list[dict[str, Any]], tools: Any = None) -> str:
    """Why a row is refused."""
    with pytest.raises(RowFault) as caught:
        ChatTokenizer(FAMILIES[family].tokenizer()).encode_messages(messages, tools)
    return caught.value.cause


def spans_of(template: str, messages: list[dict[str, Any]], tools: Any = None) -> list[tuple[str, list[str]]]:
    """The parts of a row with what stands at their places."""
    render = Renderer(make_tokenizer(template), tools)
    text = render(messages)
    found = find_places(render, messages, text)
    return [
        (str(part.value), [text[start:stop] for start, stop in found.spans.get(i, ())])
        for i, part in enumerate(found.parts)
    ]


@pytest.mark.parametrize(
    ("family", "dialogue", "part"),
    [
        ("headers", "text_call", "the assistant's content beside its tool calls"),
        ("channels", "two_calls", "tool calls"),
        ("swallowed", "tools", "the row's tools"),
        ("swallowed", "call", "tool calls"),
        ("instruct", "system", "the content of a message of role system"),
        ("words", "developer", "the content of a message of role developer"),
        ("last_thought", "all_reasoning", "the reasoning of an assistant message"),
        ("cut_thought", "all_reasoning", "the reasoning of an assistant message"),
    ],
)
def test_a_part_that_is_not_rendered_is_named(family: str, dialogue: str, part: str) -> None:
    assert cause(family, *DIALOGUES[dialogue]).startswith(f"the chat template does not render {part}")


def test_what_the_user_says_is_no_rendering_of_a_tool_or_a_call() -> None:
    call = {"type": "function", "function": {"name": "look_up", "arguments": {"city": "Paris"}}}
    asked = {"role": "user", "content": 'Can you look_up {"city": "Paris"}?'}
    tools = [{"type": "function", "function": {"name": "look_up", "description": "look_up"}}]
    assert cause("swallowed", [asked, CHAT[1]], tools) == "the chat template does not render the row's tools"
    answer = {"role": "assistant", "content": 'I look_up "city": "Paris".', "tool_calls": [call]}
    assert cause("swallowed", [asked, answer]).startswith("the chat template does not render tool calls")


def test_words_that_a_template_changes_are_named() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content | replace('you', 'thee') }}")
    with pytest.raises(RowFault, match="changes the assistant's content"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(CHAT)


def after_words(written: str) -> str:
    """A template that renders this behind the content of each message."""
    return CHATML.replace("{{ m.content }}", "{{ m.content }}" + written)


def with_calls(written: str) -> str:
    """A template that renders each call like this."""
    return after_words(f"{{% for c in m.tool_calls or [] %}}{written}{{% endfor %}}")


def test_a_text_of_another_message_inside_an_answer_is_refused() -> None:
    template = after_words("{% if m.role == 'assistant' %}{{ messages[0].content }}{% endif %}")
    with pytest.raises(RowFault, match="renders the content of a message of role user inside an answer"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(CHAT[:2])


CALL = {"type": "function", "function": {"name": "python", "arguments": {"code": "1 + 1"}}}


@pytest.mark.parametrize(
    "written",
    [
        "{% if f.name == 'python' %}run python{% else %}{{ f.name }}{% endif %}{{ f.arguments | tojson }}",
        "{{ f.name }}{% if f.arguments.code.startswith('1') %}: {% else %}({% endif %}{{ f.arguments | tojson }}",
        "{{ raise_exception('unknown') if f.name not in ['python'] }}{{ f.name }}{{ f.arguments | tojson }}",
    ],
)
def test_a_text_that_the_template_compares_is_found_between_its_neighbors(written: str) -> None:
    template = CHATML.replace(
        "{{ m.content }}",
        "{{ m.content }}{% for c in m.tool_calls or [] %}{% set f = c.function %}" + written + "{% endfor %}",
    )
    tokenizer = make_tokenizer(template)
    answer = {"role": "assistant", "content": "", "tool_calls": [CALL]}
    text = marked(tokenizer, ChatTokenizer(tokenizer).encode_messages([CHAT[0], answer]))
    assert text.count("⟦") == 1 and "python" in text.split("⟦")[1] and "1 + 1" in text.split("⟦")[1]


def test_numbers_and_booleans_are_found_where_they_are_written() -> None:
    arguments = {"n": 17, "x": 0.5, "yes": True, "no": False, "list": [17, {"deep": 17}]}
    call = {"type": "function", "function": {"name": "add", "arguments": arguments}}
    messages = [{"role": "user", "content": "17 0.5 true"}, {"role": "assistant", "content": "", "tool_calls": [call]}]
    for written in ("{{ c.function.arguments | tojson }}", "{{ c.function.arguments }}"):
        template = CHATML.replace(
            "{{ m.content }}",
            "{{ m.content }}{% for c in m.tool_calls or [] %}{{ c.function.name }}" + written + "{% endfor %}",
        )
        found = dict(spans_of(template, messages))
        assert found["17"] == ["17"] and found["0.5"] == ["0.5"]
        assert [place.lower() for place in found["True"] + found["False"]] == ["true", "false"]
    template = with_calls("{{ c.function.name }}{{ c.function.arguments.keys() | list }}")
    with pytest.raises(RowFault, match="does not render tool calls"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(messages)


def test_private_use_characters_of_a_text_are_kept_apart_from_marks() -> None:
    chat = [CHAT[0], {"role": "assistant", "content": "\ue0f0 \U000f0001 icons"}]
    assert ("\ue0f0 \U000f0001 icons", ["\ue0f0 \U000f0001 icons"]) in spans_of(CHATML, chat)
    with pytest.raises(RowFault, match="plane 16"):
        spans_of(CHATML, [CHAT[0], {"role": "assistant", "content": "\U00100001"}])


def test_the_number_of_renderings_does_not_depend_on_the_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, counts = FAMILIES["chatml"].tokenizer(), []
    plain = chat_template_utils.render_jinja_template

    def counted(*given: Any, **options: Any) -> Any:
        counts[-1] += 1
        return plain(*given, **options)

    ChatTokenizer(tokenizer).encode_messages(CHAT)  # what is found once for a template
    monkeypatch.setattr(chat_template_utils, "render_jinja_template", counted)
    for length in (1, 1000):
        counts.append(0)
        messages = [
            {"role": "user", "content": "a <think> b " * length},
            {"role": "assistant", "content": "c " * length},
        ]
        ChatTokenizer(tokenizer).encode_messages(messages)
    assert counts == [3, 3]  # the row, the row with marks, the prompt


def learned(tokenizer: Any, messages: list[dict[str, Any]], tools: Any) -> list[int]:
    """The supervised tokens of a row."""
    labels = ChatTokenizer(tokenizer).encode_messages(messages, tools)["labels"]
    return [label for label in labels if label != IGNORED_LABEL]


@pytest.mark.parametrize("dialogue", ["multi", "call", "after_loop"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_others_say_moves_no_span(family: str, dialogue: str) -> None:
    """The same tokens are learned if another message quotes the rendering of the whole conversation."""
    tokenizer = FAMILIES[family].tokenizer()
    messages, tools = DIALOGUES[dialogue]
    try:
        expected = learned(tokenizer, messages, tools)
    except RowFault:
        return
    text = tokenizer.decode(ChatTokenizer(tokenizer).encode_messages(messages, tools)["input_ids"]).strip()
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            quoting = [*messages[:i], {**message, "content": text}, *messages[i + 1 :]]
            assert learned(tokenizer, quoting, tools) == expected


def test_a_tag_that_a_template_takes_out_of_an_answer_is_missed() -> None:
    template = CHATML.replace("{{ m.content }}", "{{ m.content.replace('<mark>', '') }}")
    chat = [CHAT[0], {"role": "assistant", "content": "How <mark>are you?"}]
    with pytest.raises(RowFault, match="changes the assistant's content"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(chat)


def test_reasoning_behind_a_closed_block_is_refused() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}"
    )
    chat = [CHAT[0], {"role": "assistant", "content": "<think>Hm</think>It is Paris."}]
    with pytest.raises(RowFault, match="a closed block before the reasoning"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(chat)


def test_an_eos_inside_an_answer_is_refused() -> None:
    template = CHATML.replace(
        "{{ m.content }}", "{% if m.role == 'assistant' %}Hm{{ eos_token }}{% endif %}{{ m.content }}"
    )
    with pytest.raises(RowFault, match="renders an EOS inside an answer"):
        ChatTokenizer(make_tokenizer(template)).encode_messages(CHAT[:2])
    said = {"role": "assistant", "content": "Paris</s> it is"}
    assert ChatTokenizer(make_tokenizer(CHATML)).encode_messages([CHAT[0], said])["input_ids"]
