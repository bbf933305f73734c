"""A folder with rows to run in."""

from __future__ import annotations

from pathlib import Path

import pytest

ROW = '{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}], "text": "x"}\n'


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "rows.jsonl").write_text(ROW * 3)
    (tmp_path / "rows.csv").write_text("text;label\nx;1\n")
    (tmp_path / "rows.txt").write_text("x\n")
    monkeypatch.chdir(tmp_path)
