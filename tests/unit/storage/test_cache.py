"""Tests of the cached digests of large files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from dist_ft.storage import cache
from dist_ft.storage.cache import remembering_digest
from dist_ft.storage.files import digest_file


def test_large_files_are_hashed_once_for_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 10)
    calls: list[Path] = []
    real = digest_file
    monkeypatch.setattr(cache, "digest_file", lambda path, tick: calls.append(path) or real(path, tick))
    file = tmp_path / "large"
    file.write_bytes(b"x" * 20)
    first = [remembering_digest(tmp_path / "root")(file) for _ in range(3)]
    assert len(set(first)) == 1 and len(calls) == 1
    file.write_bytes(b"y" * 20)
    os.utime(file, ns=(1, 1))
    second = remembering_digest(tmp_path / "root")(file)
    assert second != first[0] and len(calls) == 2
    file.write_bytes(b"z" * 20)
    os.utime(file, ns=(1, 1))
    assert remembering_digest(tmp_path / "root")(file) != second and len(calls) == 3, "with the same mtime"
