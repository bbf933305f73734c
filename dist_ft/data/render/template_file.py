"""Reading of the configured chat template, without loading a tokenizer."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ...config.task import TaskChoice
from ...errors import RequestError

CHATML_FILE = Path(__file__).with_name("chatml.jinja")


def read_template(task: TaskChoice) -> str | None:
    """Return the text of `task.chat_template`, or None if the tokenizer's own template is used.

    Raises:
        RequestError: The file cannot be read.
    """
    template: str | None = getattr(task, "chat_template", None)
    if template is None:
        return None
    path = CHATML_FILE if template == "chatml" else Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        way_out = "set task.chat_template to a Jinja file, or to chatml"
        raise RequestError.of("task.chat_template", f"{path} cannot be read ({error})", way_out) from error


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
