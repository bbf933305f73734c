"""Writing of a model folder from a stream of weights: rank 0 holds at most one shard and one tensor."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, revert_weight_conversion
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from ..state import Weights

SHARD_BYTES = 2 * 2**30  # maximum file size, and thus the memory that a shard needs


def write_model(model: nn.Module, weights: Weights, out: Path, shard_bytes: int = SHARD_BYTES) -> None:
    """Write the same files as `save_pretrained`, but from a stream of tensors.

    Args:
        model: transformers model, used for configuration and names; it needs no weights.
        weights: Full tensors by parameter name, each once; consumed one by one.
        out: Folder to write to.
        shard_bytes: Maximum size of a file in bytes, unless a single tensor is larger.
    """
    save_rest(model, out)
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    places: dict[str, int] = {}
    held: dict[str, Tensor] = {}
    held_bytes = total_bytes = files = 0
    for name, tensor in to_file_names(model, ((n, t) for n, t in weights if n not in ignored)):
        size = tensor.numel() * tensor.element_size()
        if held and held_bytes + size > shard_bytes:
            files += 1
            _write(out, files, held)
            held_bytes = 0
        held[name] = tensor
        places[name] = files + 1
        held_bytes += size
        total_bytes += size
        del tensor  # otherwise it would stay in memory with the next one
    files += 1
    _write(out, files, held)
    names = {number: f"model-{number:05d}-of-{files:05d}.safetensors" for number in range(1, files + 1)}
    if files == 1:
        names = {1: SAFE_WEIGHTS_NAME}
    for number, name in names.items():
        _part(out, number).rename(out / name)
    if files > 1:
        index = {
            "metadata": {"total_size": total_bytes},
            "weight_map": {n: names[p] for n, p in sorted(places.items())},
        }
        (out / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def save_rest(model: Any, out: Path) -> None:
    """Write everything but the weights: configuration, generation settings, custom code."""
    model.save_pretrained(out, state_dict={})
    (out / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)


def to_file_names(model: Any, weights: Weights) -> Iterator[tuple[str, Tensor]]:
    """Convert tensors to the names and shapes of the model's files, in which fused tensors may be separate.

    If a tensor of the file consists of several tensors of the model, those of a block are collected first.
    """
    groups = _blocks(weights) if _joins_tensors(model) else ({name: tensor} for name, tensor in weights)
    for group in groups:
        for name, tensor in revert_weight_conversion(model, group).items():
            # Copy a view, so that it does not keep the whole tensor in memory.
            whole = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
            yield name, tensor.contiguous() if whole else tensor.clone(memory_format=torch.contiguous_format)


def _blocks(weights: Weights) -> Iterator[dict[str, Tensor]]:
    for _, group in groupby(weights, key=lambda entry: _block_of(entry[0])):
        yield dict(group)


def _joins_tensors(model: Any) -> bool:
    reverse = (c.reverse_transform() for c in get_model_conversion_mapping(model, add_legacy=False))
    return any(isinstance(c, WeightConverter) and len(c.source_patterns) > 1 for c in reverse)


def _block_of(name: str) -> str:
    """Return the prefix of the block, such as `model.layers.3.`; outside of blocks, the name itself."""
    found = re.match(r".*?\.\d+\.", name)
    return found[0] if found else name


def _part(out: Path, number: int) -> Path:
    return out / f"model.part-{number}"


def _write(out: Path, number: int, held: dict[str, Tensor]) -> None:
    save_file(held, _part(out, number), metadata={"format": "pt"})
    held.clear()
