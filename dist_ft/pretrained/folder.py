"""Facts read from the files of a pretrained model's folder, without torch."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import Problem

BITSANDBYTES = "bitsandbytes"
COMPRESSED_TENSORS = "compressed-tensors"
# Formats of quantized weights that transformers turns back into 16 bits, and how many times smaller they are.
DEQUANTIZABLE = {"fp8": 2, "mxfp8": 2, "mxfp4": 4, BITSANDBYTES: 4, COMPRESSED_TENSORS: 4}


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
    """Return the size in bytes of a local folder's weights, dequantized; None if there is no such folder."""
    folder = Path(name_or_path)
    if not folder.is_dir():
        return None
    growth = DEQUANTIZABLE.get(stored_scheme(folder) or "", 1)
    return growth * sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files that transformers loads from a model's folder, which may hold others too."""
    whole, index = folder / "model.safetensors", read_json(folder / "model.safetensors.index.json")[0]
    if whole.exists():
        return [whole]
    if index:
        return [folder / name for name in sorted(set(index["weight_map"].values()))]
    return sorted(folder.glob("*.safetensors"))


def stored_quantization(config: Mapping[str, Any]) -> Mapping[str, Any] | None:
    """Return how config.json says that the weights are quantized; None if they are not."""
    found = config.get("quantization_config") or (config.get("text_config") or {}).get("quantization_config")
    return found if isinstance(found, Mapping) else None


def stored_scheme(folder: Path) -> str | None:
    """Return the format that a folder's weights are quantized in; None if they are not."""
    stored = stored_quantization(read_json(folder / "config.json")[0])
    return None if stored is None else str(stored.get("quant_method"))


def stored_problem(stored: Mapping[str, Any]) -> Problem | None:
    """Return why weights that are quantized in this way cannot be trained; None if they can be dequantized."""
    key, method = "model.name_or_path", stored.get("quant_method") or "an unnamed format"
    if method == COMPRESSED_TENSORS and importlib.util.find_spec("compressed_tensors") is None:
        rule = "the weights are stored in compressed-tensors, and the package that reads them is not installed"
        return Problem(key, rule, "run pip install compressed-tensors, or use the 16-bit model that it was made from")
    if method in DEQUANTIZABLE:
        return None
    rule = f"the weights are stored quantized ({method}), and transformers cannot turn them back into 16 bits"
    way_out = "use the 16-bit model that they were made from; method=qlora quantizes it while it is read"
    return Problem(key, rule, way_out)


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
