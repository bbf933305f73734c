"""Samples and model inputs written by hand."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dist_ft.state import Sample


def given(token_ids: Iterable[int]) -> dict[str, torch.Tensor]:
    """What a model is given of at most 64 tokens."""
    return {"input_ids": torch.tensor([[int(token) for token in token_ids][:64]])}


def samples_of(segments: Iterable[Sequence[Mapping[str, np.ndarray]]]) -> list[Sample]:
    """Samples in their order."""
    return [Sample(parts, index) for index, parts in enumerate(segments)]


def question_row(context: str, question: str, *answers: str | tuple[str, int]) -> dict[str, Any]:
    """A row of SQuAD; of an answer without its place the first is taken."""
    pairs = [(given, context.find(given)) if isinstance(given, str) else given for given in answers]
    return {
        "context": context,
        "question": question,
        "answers": {"text": [text for text, _ in pairs], "answer_start": [place for _, place in pairs]},
    }
