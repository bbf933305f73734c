"""Next-token prediction: collation of micro-batches and the loss, shared by the tasks for causal language models."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from ...data.read.formats import IGNORED_LABEL
from ...state import Batch, LossSum, Metrics, Sample

if TYPE_CHECKING:
    from ...model.head import OutputHead


def collate_documents(samples: Sequence[Sample]) -> Batch:
    """Concatenate all segments into one row `[1, tokens]` without padding, with `document_lengths` to separate them."""
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
    """Right-pad each sample to a row of `[batch, seq_len]`.

    A sample must have a single segment, because attention covers the whole row.
    """
    assert all(len(sample.segments) == 1 for sample in samples), "packed samples require padding-free micro-batches"
    segments = [sample.segments[0] for sample in samples]
    lengths = [len(segment["input_ids"]) for segment in segments]
    ids = torch.zeros(len(segments), max(lengths), dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, (segment, length) in enumerate(zip(segments, lengths, strict=True)):
        ids[i, :length] = torch.from_numpy(segment["input_ids"].astype(np.int64))
        mask[i, :length] = 1
    origins = [i * max(lengths) for i in range(len(segments))]
    return _with_targets({"input_ids": ids, "attention_mask": mask}, samples, origins, sum(lengths))


def sum_losses(model: nn.Module, batch: Batch, head: OutputHead | None = None) -> LossSum:
    """Compute the sum of the cross-entropy over all targets, in float32, and the number of targets."""
    return _sum(_token_losses(model, batch, head)[0], batch)


def sum_scores(model: nn.Module, batch: Batch, head: OutputHead | None = None) -> LossSum:
    """Compute the loss and count correctly predicted tokens and documents whose tokens are all predicted correctly.

    Greedy decoding from a prompt generates exactly the answer if and only if, with teacher forcing, every token of the
    answer is the most probable one. Therefore, exact matches are counted without generating text.
    """
    losses, right = _token_losses(model, batch, head, judged=True)
    none = batch.documents.new_zeros(len(batch.samples))  # counted by additions: a bincount would wait for the device
    targets = none.index_add(0, batch.documents, torch.ones_like(batch.documents))
    hits = none.index_add(0, batch.documents, right.long())
    counts = {
        "correct_tokens": right.sum(),
        "exact_rows": ((hits == targets) & (targets > 0)).sum(),
        "rows": (targets > 0).sum(),
    }
    return replace(_sum(losses, batch), counts=counts)


def sum_log_probabilities(model: nn.Module, batch: Batch, head: OutputHead | None = None) -> Tensor:
    """Return the sum of the log-probabilities of the targets of each document, `[documents]` float64.

    The sums are in float64, because preference losses take small differences between large sums.
    """
    losses = _token_losses(model, batch, head)[0].double()
    return -losses.new_zeros(len(batch.samples)).index_add(0, batch.documents, losses)


def metrics_of(totals: LossSum, *, exact: bool) -> Metrics:
    """Compute the metrics of a split from its sums.

    Args:
        totals: Sums over all micro-batches and ranks.
        exact: Whether to report `exact_match`, which is meaningful if the documents are answers to prompts.
    """
    weight = float(totals.weight)
    assert weight > 0, "a prepared split has supervised tokens"
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
    """Build a batch with shifted labels: token t + 1 of a segment is the target of position t."""
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
    """Return the logits at the positions that predict a target, `[targets, vocab_size]`.

    For padding-free micro-batches, the model computes no other logits.
    """
    if "document_lengths" in batch.inputs:
        logits: Tensor = model(**batch.inputs, use_cache=False, logits_to_keep=batch.positions).logits[0]
        return logits
    padded: Tensor = model(**batch.inputs, use_cache=False).logits
    width = batch.inputs["input_ids"].shape[1]  # the method may have prepended virtual tokens
    return padded[:, -width:].flatten(0, 1)[batch.positions]


def _token_losses(
    model: nn.Module, batch: Batch, head: OutputHead | None, *, judged: bool = False
) -> tuple[Tensor, Tensor]:
    """Return the loss of each target, `[targets]` float32, and, if `judged`, whether it is the most probable token.

    Few logits are computed at once, all others by the head in chunks; padded rows by the head only at the targets.
    """
    if head is not None and ("document_lengths" not in batch.inputs or head.divides(batch.supervised)):
        width = batch.inputs["input_ids"].shape[1]
        return head.token_losses(model, batch, width=width, judged=judged, use_cache=False)
    logits = _logits(model, batch)
    right = logits.argmax(dim=-1) == batch.targets if judged else batch.targets.new_empty(0)
    return functional.cross_entropy(logits.float(), batch.targets, reduction="none"), right


def _sum(losses: Tensor, batch: Batch) -> LossSum:
    weight = losses.new_full((), float(batch.supervised))
    return LossSum(losses.sum(), weight, losses=losses)
