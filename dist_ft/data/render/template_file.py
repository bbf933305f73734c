"""Reading of the configured chat template, without loading a tokenizer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.task import SHIPPED_TEMPLATES, TaskChoice
from ...errors import RequestError

_FOLDER = Path(__file__).parent
_DEFAULT = re.compile(r"\{% set (\w+) = \1 if \1 is defined and \1 is not none else [^\n]*? %\}")
_OWN = "{# the template of the model #}"  # in a shipped template that changes messages and leaves the rest to it


def read_template(task: TaskChoice) -> str | None:
    """Return the text of `task.chat_template`, or None if the tokenizer's own template is used.

    Raises:
        RequestError: The file cannot be read.
    """
    template: str | None = getattr(task, "chat_template", None)
    if template is None:
        return None
    path = _FOLDER / f"{template}.jinja" if template in SHIPPED_TEMPLATES else Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        way_out = f"set task.chat_template to a Jinja file, or to one of {', '.join(SHIPPED_TEMPLATES)}"
        raise RequestError.of("task.chat_template", f"{path} cannot be read ({error})", way_out) from error


def with_own(template: str | None, own: Any) -> Any:
    """Return the chat template of a run: the configured one, if any, around or in place of the tokenizer's own.

    Args:
        template: Text of `task.chat_template`.
        own: The tokenizer's template, or templates by name.

    Raises:
        RequestError: The configured template needs the tokenizer's own, and there is none.
    """
    if template is None or _OWN not in template:
        return own if template is None else template
    if own is None:
        rule = "this template changes messages for the tokenizer's own template, and the tokenizer has none"
        raise RequestError.of("task.chat_template", rule, "set task.chat_template=chatml")
    if isinstance(own, Mapping):
        return {name: with_own(template, text) for name, text in own.items()}
    return template.rstrip("\n").replace(_OWN, own)


def with_defaults(template: Any, variables: Mapping[str, Any]) -> Any:
    """Return a chat template, or templates by name, in which variables that the caller does not give have defaults.

    So training, generation and the exported tokenizer render alike.
    """
    if not variables or template is None:
        return template
    if isinstance(template, Mapping):
        return {name: with_defaults(text, variables) for name, text in template.items()}
    first = "".join(
        f"{{% set {name} = {name} if {name} is defined and {name} is not none else {value!r} %}}"
        for name, value in variables.items()
    )
    return f"{first}\n{template}"  # the environment removes the line break behind a block


def defaults_of(template: str) -> set[str]:
    """Return the variables that have defaults by `with_defaults`."""
    return {found[1] for found in _DEFAULT.finditer(template.partition("\n")[0])}
