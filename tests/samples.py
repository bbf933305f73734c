"""Samples and model inputs written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch

from dist_ft.state import Sample


def given(token_ids: Iterable[int]) -> dict[str, torch.Tensor]:
    """What a model is given of at most 64 tokens."""
    return {"input_ids": torch.tensor([[int(token) for token in token_ids][:64]])}


def samples_of(segments: Iterable[Sequence[Mapping[str, np.ndarray]]]) -> list[Sample]:
    """Samples in their order."""
    return [Sample(parts, index) for index, parts in enumerate(segments)]
