"""Proof that the documents of one row, and the rows of one padded micro-batch, do not change each other's logits.

An attention function keeps documents apart only where a model mixes tokens in attention alone, passes its keyword
arguments on, and uses no other mask than a causal one with a sliding window. Convolutions, state-space models, linear
attention, chunked attention and sparse attention are exceptions, and no flag of a class tells which. A miniature of the
class therefore computes documents alone, in one row, and in padded rows.
"""

from __future__ import annotations

import copy
import functools
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedConfig, PreTrainedModel

from .attention.documents import REFERENCE, asking
from .miniature import VOCABULARY, WINDOW, build_miniature, draw_weights

LENGTHS = (4 * WINDOW + 1, 2 * WINDOW + 1, 2 * WINDOW - 1, 3)  # more and less padding than a window
DRAWS = 4  # of weights, where documents are padded
TOLERANCE = 1e-4  # of the logits' norm; rounding in float32 parts gives at most 1e-6, a visible neighbor at least 1e-2


@dataclass(frozen=True)
class Isolation:
    """Why each layout of a micro-batch changes logits; None if it does not.

    If no miniature can be computed, nothing is proven, and rows are padded as transformers documents it.
    """

    documents: str | None  # several documents concatenated in one row
    padding: str | None  # several rows, padded to the longest
    one_call: str | None = None  # why kernels that compute all documents in one call would change logits
    asks: frozenset[str] = frozenset()  # what attention does besides a softmax over scaled scores


@dataclass(frozen=True)
class _Question:
    """A model class and its configuration; equal for equal configurations."""

    model_class: type[PreTrainedModel]
    text: str
    settings: PreTrainedConfig = field(compare=False)


def isolation_of(
    model_class: type[PreTrainedModel], settings: PreTrainedConfig, kernel: str, by_document: str | None
) -> Isolation:
    """Prove which layouts of micro-batches are exact for a causal language model.

    Args:
        model_class: Class of the model.
        settings: Its configuration.
        kernel: Name of the attention implementation that computes rows alone and padded rows.
        by_document: Name of the attention implementation that separates documents; None if the model takes none.
    """
    question = _Question(model_class, settings.to_json_string(use_diff=False), copy.deepcopy(settings))
    return _prove(question, kernel, by_document)


@functools.lru_cache(maxsize=32)
def _prove(question: _Question, kernel: str, by_document: str | None) -> Isolation:
    name = question.model_class.__name__
    documents = torch.randint(1, VOCABULARY - 1, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(0))
    for dtype in (torch.float64, torch.float32):
        try:
            model = build_miniature(question.model_class, question.settings, kernel, dtype)
            exact = _pads_exactly(model, documents)
            break
        except Exception as error:  # a class can fail in any way on a configuration of other sizes
            unproven = f"no small {name} could be computed: {_first_line(error)}"
    else:
        return Isolation(unproven, None)
    seen: str | None = f"{name} passes no lengths of documents to its attention"
    one_call, asks = seen, frozenset[str]()
    if by_document is not None:
        seen = _see_each_other(model, kernel, by_document, documents)
        with asking() as asked:
            one_call = _see_each_other(model, kernel, REFERENCE, documents)
        asks = frozenset(asked)
    if seen is None and exact:
        return Isolation(None, None, one_call, asks)
    for seed in range(1, DRAWS):  # sparse attention may select padding with some weights and not with others
        if exact:
            draw_weights(model, seed)
            exact = _pads_exactly(model, documents)
    return Isolation(seen, None if exact else f"padding changes the logits of {name}", one_call, asks)


def _pads_exactly(model: PreTrainedModel, documents: Tensor) -> bool:
    """Return whether each document has the same logits alone and in padded rows."""
    parts = documents.split(LENGTHS, dim=1)
    padded = _logits(model, **_pad(parts))
    return _equal([row[:length] for row, length in zip(padded, LENGTHS, strict=True)], _alone(model, documents))


def _alone(model: PreTrainedModel, documents: Tensor) -> list[Tensor]:
    return [_logits(model, input_ids=part)[0] for part in documents.split(LENGTHS, dim=1)]


def _see_each_other(model: PreTrainedModel, kernel: str, by_document: str, documents: Tensor) -> str | None:
    """Return why documents in one row differ from documents alone; None if they do not."""
    name, alone = type(model).__name__, _alone(model, documents)
    positions = torch.cat([torch.arange(length) for length in LENGTHS])[None]
    model.set_attn_implementation(by_document)
    try:
        together = _logits(model, input_ids=documents, position_ids=positions, document_lengths=LENGTHS)[0]
    except Exception as error:
        return f"{name} computes no row of several documents ({_first_line(error)})"
    finally:
        model.set_attn_implementation(kernel)
    same = _equal(list(together.split(LENGTHS)), alone)
    return None if same else f"the documents of a row change each other in {name}"


@torch.no_grad()
def _logits(model: PreTrainedModel, **inputs: Any) -> Tensor:
    logits: Tensor = model(**inputs, use_cache=False).logits
    return logits


def _pad(parts: tuple[Tensor, ...]) -> dict[str, Tensor]:
    ids = torch.zeros(len(parts), max(LENGTHS), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, part in enumerate(parts):
        ids[i, : part.shape[1]] = part
        mask[i, : part.shape[1]] = 1
    return {"input_ids": ids, "attention_mask": mask}


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    return all(bool((a - b).norm() <= TOLERANCE * b.norm()) for a, b in zip(found, expected, strict=True))  # not NaN


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
