"""The chat template that a configuration names, as text; no tokenizer is needed to read it."""

from __future__ import annotations

from pathlib import Path

from ...config.task import TaskChoice
from ...errors import RequestError

CHATML_FILE = Path(__file__).with_name("chatml.jinja")


def read_template(task: TaskChoice) -> str | None:
    """The text of `task.chat_template`; None where the tokenizer's own is meant.

    Raises:
        RequestError: the file cannot be read.
    """
    template: str | None = getattr(task, "chat_template", None)
    if template is None:
        return None
    path = CHATML_FILE if template == "chatml" else Path(template).expanduser()
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        way_out = "name a Jinja file, or chatml"
        raise RequestError.of("task.chat_template", f"{path} cannot be read ({error})", way_out) from error
