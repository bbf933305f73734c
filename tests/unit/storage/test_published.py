"""Tests of the atomic publication of cache folders."""

from __future__ import annotations

import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.errors import MachineError
from dist_ft.storage.published import is_whole, publish, require_room

MIB = 1 << 20


def test_a_folder_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    folder = tmp_path / "deep" / "thing"

    def fail(out: Path) -> None:
        (out / "half").write_text("x")
        raise ValueError("stopped")

    with pytest.raises(ValueError, match="stopped"):
        publish(folder, fail)
    assert not folder.exists() and [p.name for p in folder.parent.iterdir() if p.is_dir()] == []
    left_by_a_killed_process = folder.parent / ".thing-abc"
    left_by_a_killed_process.mkdir()
    publish(folder, lambda out: (out / "a").write_text("xyz") and None)
    assert is_whole(folder) and not left_by_a_killed_process.exists()
    publish(folder, fail)  # already complete, so build is not called
    (folder / "a").write_text("torn: the size differs")
    assert not is_whole(folder)
    publish(folder, lambda out: (out / "b").write_text("new") and None)
    assert is_whole(folder) and not (folder / "a").exists()


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from dist_ft.storage.published import publish\n"
        "def build(out):\n    time.sleep(0.3); (out / 'a').write_text('x'); print('built')\n"
        f"publish(pathlib.Path({str(tmp_path / 'thing')!r}), build)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0] for process in started) == ["", "", "built\n"]
    assert all(process.returncode == 0 for process in started)


@pytest.mark.parametrize(
    ("code", "rule"),
    [(errno.ENOSPC, "no space is left"), (errno.EACCES, "is not writable"), (errno.EROFS, "is not writable")],
)
def test_disk_faults_are_the_machines(tmp_path: Path, code: int, rule: str) -> None:
    def fail(out: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(MachineError, match=rule) as caught:
        publish(tmp_path / "thing", fail)
    assert "data.cache_dir" in caught.value.problems[0].way_out


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "yet", MIB)
    with pytest.raises(MachineError, match="MiB free, but about"):
        require_room(tmp_path / "not" / "yet", 1 << 60)
