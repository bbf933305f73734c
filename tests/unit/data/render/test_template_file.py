"""Variables of a chat template that are set in the configuration are defaults of the template itself."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.data.render.template_file import with_defaults
from tests.unit.data.render.chats import CHAT, CHATML, make_tokenizer

DOCUMENTS = "{% for d in documents or [] %} {{ d.title }}{% endfor %}"
SHOWN = f"  {{% if enable_thinking %}}\nthinks {{{{ effort }}}}{DOCUMENTS}\n{{% endif %}}\n"


def rendered(template: Any, **given: Any) -> str:
    return str(make_tokenizer(template).apply_chat_template(CHAT, tokenize=False, **given))


@pytest.mark.parametrize("template", [SHOWN, "\n" + SHOWN, "{%- if true %}" + SHOWN + "{% endif %}", CHATML])
def test_a_variable_has_the_default_and_can_be_given(template: str) -> None:
    values = {"enable_thinking": True, "effort": 'it\'s "high" %}\n', "documents": [{"title": "é"}]}
    changed = with_defaults(template, values)
    assert rendered(changed) == rendered(template, **values)
    assert rendered(changed, effort="low") == rendered(template, **{**values, "effort": "low"})
    assert rendered(changed, enable_thinking=False) == rendered(template, **{**values, "enable_thinking": False})


def test_without_variables_a_template_stays_as_it_is() -> None:
    assert with_defaults(SHOWN, {}) is SHOWN and with_defaults(None, {"a": 1}) is None


def test_each_of_several_templates_has_the_defaults() -> None:
    both = with_defaults({"default": SHOWN, "tool_use": "tools"}, {"effort": "low"})
    assert rendered(both["default"], enable_thinking=True) == rendered(SHOWN, enable_thinking=True, effort="low")
    assert rendered(both["tool_use"]) == "tools"
