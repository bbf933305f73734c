"""Tests of the entry point of commands: exit codes and the file of the run."""

from __future__ import annotations

import sys

import pytest

from dist_ft.errors import MachineError, RequestError
from dist_ft.process.command import run_command, split_run


def test_the_run_comes_first() -> None:
    assert split_run(["a/run.yaml", "x=1"], "evaluate") == ("a/run.yaml", ["x=1"])
    for words in ([], ["x=1"]):
        with pytest.raises(RequestError, match="start evaluate with"):
            split_run(words, "evaluate")


def test_exit_codes(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "argv", ["x", "word"])

    def fail(words: list[str]) -> None:
        assert words == ["word"]
        raise MachineError.of("disk", "is full", "make room")

    assert run_command(fail) == 3
    assert capsys.readouterr().err == "dist-ft: unsuitable environment\ndisk: is full\n    → make room\n"
    assert run_command(lambda words: None) == 0
