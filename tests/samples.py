"""Samples and model inputs written by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from dist_ft.model.anatomy import find_anatomy
from dist_ft.state import BuiltModel, Sample


def given(token_ids: Iterable[int]) -> dict[str, torch.Tensor]:
    """What a model is given of at most 64 tokens."""
    return {"input_ids": torch.tensor([[int(token) for token in token_ids][:64]])}


def on_meta(build: Callable[[bool], Any]) -> Any:
    """The modules that `build(False)` gives, on the meta device."""
    with torch.device("meta"):
        return build(False)


def anatomized(model: Any) -> BuiltModel:
    """A model to which no method was applied, with its anatomy."""
    return BuiltModel(model, find_anatomy(model))


def apply_method(method: Any, model: Any) -> BuiltModel:
    """The model with a method applied, and its anatomy."""
    anatomy = find_anatomy(model)
    return BuiltModel(method.apply(anatomy), anatomy)


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
