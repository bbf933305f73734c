"""Next-token prediction: the layout of micro-batches and the loss, shared by the tasks of causal language models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data.read.formats import IGNORED_LABEL
from ...state import Batch, LossSum, Metrics, Sample


def collate_documents(samples: Sequence[Sample]) -> Batch:
    """All segments one after another in one row of T tokens, their lengths beside it; nothing is padded."""
    segments = [segment for sample in samples for segment in sample.segments]
    lengths = tuple(len(segment["input_ids"]) for segment in segments)
    inputs = {
        "input_ids": torch.from_numpy(_joined(segment["input_ids"] for segment in segments))[None],
        "position_ids": torch.cat([torch.arange(length) for length in lengths])[None],
        "document_lengths": lengths,
    }
    origins = np.cumsum([0, *lengths[:-1]]).tolist()
    return _with_targets(inputs, samples, origins, sum(lengths))


def collate_padded(samples: Sequence[Sample]) -> Batch:
    """A row of [B, T] for each sample, padded behind; a sample is one segment, as rows of this layout see all of it."""
    assert all(len(sample.segments) == 1 for sample in samples), "packed samples need the layout without padding"
    segments = [sample.segments[0] for sample in samples]
    lengths = [len(segment["input_ids"]) for segment in segments]
    ids = torch.zeros(len(segments), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (segment, length) in enumerate(zip(segments, lengths, strict=True)):
        ids[i, :length] = torch.from_numpy(segment["input_ids"].astype(np.int64))
        mask[i, :length] = 1
    origins = [i * max(lengths) for i in range(len(segments))]
    return _with_targets({"input_ids": ids, "attention_mask": mask}, samples, origins, sum(lengths))


def sum_losses(model: nn.Module, batch: Batch) -> LossSum:
    """Sum of cross-entropies (float32) over the targets, and their number."""
    return _loss(_logits(model, batch), batch)


def sum_scores(model: nn.Module, batch: Batch) -> LossSum:
    """The loss, with how many targets the model would have chosen, and documents all of whose targets it would.

    Greedy decoding from a prompt gives the answer exactly where, with the answer before it, every token of the
    answer is the most probable one; so no text needs to be generated to count exact answers.
    """
    logits = _logits(model, batch)
    result = _loss(logits, batch)
    right = logits.argmax(dim=-1) == batch.targets
    documents = int(batch.documents.max()) + 1 if batch.supervised else 0
    targets = torch.bincount(batch.documents, minlength=documents)
    hits = torch.bincount(batch.documents[right], minlength=documents)
    counts = {
        "correct_tokens": right.sum(),
        "exact_rows": ((hits == targets) & (targets > 0)).sum(),
        "rows": (targets > 0).sum(),
    }
    return replace(result, counts=counts)


def sum_log_probabilities(model: nn.Module, batch: Batch) -> Tensor:
    """[documents] float64: the sum of each document's targets' log-probabilities.

    In float64, as preference losses take differences of sums that are large beside them.
    """
    losses = functional.cross_entropy(_logits(model, batch).float(), batch.targets, reduction="none").double()
    return -losses.new_zeros(len(batch.samples)).index_add(0, batch.documents, losses)


def metrics_of(totals: LossSum, *, exact: bool) -> Metrics:
    """Means of what was summed over a whole split.

    Args:
        totals: sums over all micro-batches and ranks.
        exact: whether a document is an answer, so that the share of exact ones means something.
    """
    weight = float(totals.weight)
    assert weight > 0, "prepare refuses a split without supervised tokens"
    loss = float(totals.loss) / weight
    metrics = {
        "loss": loss,
        "perplexity": math.exp(loss) if loss < 700 else math.inf,
        "token_accuracy": float(totals.counts["correct_tokens"]) / weight,
    }
    if exact:
        metrics["exact_match"] = float(totals.counts["exact_rows"]) / float(totals.counts["rows"])
    return metrics


def _joined(pieces: Iterator[np.ndarray]) -> np.ndarray:
    return np.concatenate(list(pieces)).astype(np.int64)


def _with_targets(inputs: dict[str, Any], samples: Sequence[Sample], origins: Sequence[int], tokens: int) -> Batch:
    """The shift: token t + 1 of a segment is the target of position t; a segment's first token is no target."""
    targets, positions, documents = [], [], []
    numbered = [(sample.index, segment) for sample in samples for segment in sample.segments]
    for document, ((_, segment), origin) in enumerate(zip(numbered, origins, strict=True)):
        labels = segment["labels"][1:]
        at = np.flatnonzero(labels != IGNORED_LABEL)
        targets.append(labels[at])
        positions.append(at + origin)
        documents.append(np.full(len(at), document))
    flat = [torch.from_numpy(_joined(iter(pieces))) for pieces in (targets, positions, documents)]
    return Batch(inputs, flat[0], flat[1], flat[2], tokens, tuple(index for index, _ in numbered))


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, vocabulary]: logits at the positions that predict a target; where possible no others are computed."""
    if "document_lengths" in batch.inputs:
        logits: Tensor = model(**batch.inputs, use_cache=False, logits_to_keep=batch.positions).logits[0]
        return logits
    padded: Tensor = model(**batch.inputs, use_cache=False).logits
    width = batch.inputs["input_ids"].shape[1]  # a method may have put virtual tokens in front
    return padded[:, -width:].flatten(0, 1)[batch.positions]


def _loss(logits: Tensor, batch: Batch) -> LossSum:
    losses = functional.cross_entropy(logits.float(), batch.targets, reduction="none")
    weight = torch.tensor(float(batch.supervised), device=losses.device)
    return LossSum(losses.sum(), weight, losses=losses)
