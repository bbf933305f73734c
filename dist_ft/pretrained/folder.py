"""Facts read from the files of a pretrained model's folder, without torch."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def is_known_dense(name_or_path: str) -> bool:
    """Return whether a local folder's config.json mentions no experts.

    This is a preliminary check: the modules of the loaded model are authoritative.
    """
    config, problem = read_json(Path(name_or_path) / "config.json")
    if problem is not None:
        return False
    sections = [config, *(value for value in config.values() if isinstance(value, dict))]
    return not any("expert" in key for section in sections for key in section)


def weight_bytes(name_or_path: str) -> int | None:
    """Return the size in bytes of a local folder's safetensors files; None if there is no such folder."""
    folder = Path(name_or_path)
    return sum(file.stat().st_size for file in folder.glob("*.safetensors")) if folder.is_dir() else None


def read_json(file: Path) -> tuple[dict[str, Any], str | None]:
    """Return a file's JSON object and None, or an empty dictionary and a description of the problem."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}, f"{file.parent} has no {file.name}"
    except (OSError, ValueError) as error:
        return {}, f"{file} cannot be read: {error}"
    return (value, None) if isinstance(value, dict) else ({}, f"{file} does not contain a JSON object")


def decoder_start(folder: Path) -> int:
    """Return the decoder start token id of an encoder-decoder; 0, which is not used, for other models."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return 0
    found = (config.get(name) for name in ("decoder_start_token_id", "pad_token_id"))
    return next((number for number in found if isinstance(number, int)), 0)


def vocabulary_size(folder: Path) -> int | None:
    """Return the vocabulary size in config.json, or None if it is not given."""
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    size = config.get("vocab_size") or (config.get("text_config") or {}).get("vocab_size")
    return size if isinstance(size, int) else None
