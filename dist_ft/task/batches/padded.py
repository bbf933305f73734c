"""Collation of padded micro-batches, shared by the tasks that do not use padding-free micro-batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...state import Example, Facts, Sample


def pad_rows(rows: Sequence[np.ndarray], value: int) -> Tensor:
    """Right-pad sequences with `value` to the length of the longest one, `[batch, seq_len]` int64."""
    padded = torch.full((len(rows), max(len(row) for row in rows)), value, dtype=torch.int64)
    for i, row in enumerate(rows):
        padded[i, : len(row)] = torch.from_numpy(np.asarray(row, dtype=np.int64))
    return padded


def pad_inputs(segments: Sequence[Mapping[str, np.ndarray]], facts: Facts) -> dict[str, Any]:
    """Build the padded `input_ids`, `attention_mask` and, if the tokenizer uses them, `token_type_ids`.

    All of them are `[batch, seq_len]` int64.
    """
    inputs = {
        "input_ids": pad_rows([segment["input_ids"] for segment in segments], facts.pad_id),
        "attention_mask": pad_rows([np.ones(len(segment["input_ids"])) for segment in segments], 0),
    }
    if facts.has_token_types:
        inputs["token_type_ids"] = pad_rows([segment["token_type_ids"] for segment in segments], 0)
    return inputs


def only_segments(samples: Sequence[Sample]) -> list[Mapping[str, np.ndarray]]:
    """Return the only segment of each sample."""
    assert all(len(sample.segments) == 1 for sample in samples)
    return [sample.segments[0] for sample in samples]


def input_columns(facts: Facts) -> tuple[str, ...]:
    """Return the names of the tokenizer outputs that are stored as columns and passed to the model."""
    return ("input_ids", "token_type_ids") if facts.has_token_types else ("input_ids",)


def tokenize(tokenizer: Any, facts: Facts, text: str, pair: str | None = None, **options: Any) -> Example:
    """Tokenize a text or a pair of texts, with special tokens.

    Args:
        tokenizer: Tokenizer of transformers.
        facts: Properties of the data and the tokenizer, which determine the columns.
        text: Text, or first text of a pair.
        pair: Second text of a pair.
        **options: Further arguments of the tokenizer, such as `truncation`.
    """
    encoded = tokenizer(text, pair, return_attention_mask=False, verbose=False, **options)
    return {name: list(encoded[name]) for name in input_columns(facts)}
