"""Tests of the help of commands: every own word is listed with its default."""

from __future__ import annotations

import pytest

from dist_ft.launch import cli
from dist_ft.process import options


@pytest.mark.parametrize("name", [name for name, entry in cli.COMMANDS.items() if entry[3]])
def test_help_lists_the_words_of_the_command(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main([name, "--help"])
    text = capsys.readouterr().out
    for key, field in getattr(options, str(cli.COMMANDS[name][3])).model_fields.items():
        default = "" if field.is_required() or field.default is None else str(field.default)
        line = next(line for line in text.splitlines() if line.startswith(f"  {key}="))
        assert line.lower().startswith(f"  {key}={default}".lower()), line
        assert (field.description or "").split()[0] in text
    assert all(len(line) <= 120 for line in text.splitlines())
