"""Tests of completion: what argcomplete, as a shell calls it, offers for the words of a command."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.launch import cli
from dist_ft.launch.guide.completion import SHELLS

ROOT = Path(__file__).resolve().parents[4]


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("dist-ft pla", {"plan"}),
        ("dist-ft train method=l", {"method=ln_tuning", "method=lora"}),
        ("dist-ft plan method.use_d", {"method.use_dora="}),
        ("dist-ft plan sh", {"show="}),
        ("dist-ft eval bas", {"baseline="}),
    ],
)
def test_a_shell_is_offered(line: str, offered: set[str], tmp_path: Path) -> None:
    out = tmp_path / "out"
    asked = {"_ARGCOMPLETE": "1", "COMP_LINE": line, "COMP_POINT": str(len(line)), "COMP_TYPE": "9"}
    env = {**os.environ, **asked, "_ARGCOMPLETE_IFS": "\n", "_ARGCOMPLETE_STDOUT_FILENAME": str(out)}
    env["_ARGCOMPLETE_COMP_WORDBREAKS"] = " \t\n"
    subprocess.run([sys.executable, "-m", "dist_ft.launch.cli"], env=env, check=True, cwd=ROOT)
    assert {word.strip() for word in out.read_text().splitlines()} == offered


@pytest.mark.parametrize("shell", SHELLS)
def test_shell_code(shell: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["completion", shell]) == 0
    code = capsys.readouterr().out
    assert "dist-ft" in code
    if shell == "bash":
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)
