"""Classification of texts or pairs of texts, single-label or multi-label, with encoders or decoders."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import SequenceClassificationConfig
from ..data.read.faults import EMPTY_TEXT, RowFault
from ..data.render.labels import head_settings, number_of
from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample

if TYPE_CHECKING:
    from torch import Tensor, nn


LABEL = "label"


class SequenceClassification(Task):
    """The task `sequence_classification`.

    The head is that of transformers, which reads the first token of an encoder, or the last token of a decoder that is
    not padding.

    Args:
        config: Task configuration.
        facts: Properties of the data and the tokenizer: labels and padding.
        padding_free: Ignored; this task always pads.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: SequenceClassificationConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: SequenceClassificationConfig, facts: Facts) -> Architecture:
        """Return the architecture: a newly initialized head with one output per label; config.json gets the labels."""
        kind = "multi_label_classification" if config.multi_label else "single_label_classification"
        overrides = {**head_settings(facts), "problem_type": kind}
        return Architecture("AutoModelForSequenceClassification", overrides, new_head=True)

    @staticmethod
    def labels_of(row: Row) -> Iterable[tuple[int | str, str | None]]:
        """Return the labels of a row, each with its name if the row has one; missing labels are skipped."""
        several = row["label"] if isinstance(row["label"], list) else [row["label"]]
        return [(value, row.get("label_text")) for value in several if value not in (None, "")]

    @property
    def layout(self) -> Layout:
        """One sequence per row, with the indices of its labels."""
        from .batches.padded import input_columns

        return Layout({"max_length": self.config.max_length}, input_columns(self.facts), (LABEL,))

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a text or a pair of texts, and convert its labels to indices.

        Raises:
            RowFault: If the text is empty, a label is missing or unknown, or the row has several labels without
                `task.multi_label`.
        """
        return self._encode(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row and truncate it to `max_length` tokens; of a pair of texts, the longer one is truncated."""
        return self._encode(row, tokenizer, truncation=True, max_length=self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return 1 for each sample, `[samples]` int64: each row is one term of the loss."""
        return np.ones(len(samples), dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples into padded rows; targets are label indices, `[batch]`, or multi-hot, `[batch, labels]`."""
        import torch

        from .batches.padded import only_segments, pad_inputs

        segments = only_segments(samples)
        inputs = pad_inputs(segments, self.facts)
        places = torch.arange(len(segments))
        labels = [segment[LABEL].tolist() for segment in segments]
        if self.config.multi_label:
            targets = torch.zeros(len(labels), len(self.facts.labels))
            for row, numbers in zip(targets, labels, strict=True):
                row[numbers] = 1.0
            weight = float(targets.numel())
        else:
            targets = torch.tensor([numbers[0] for numbers in labels])
            weights = self.class_weights()
            weight = float(len(targets)) if weights is None else float(weights[targets].sum())
        tokens = int(inputs["attention_mask"].sum())
        return Batch(inputs, targets, places, places, tokens, tuple(sample.index for sample in samples), weight)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the weighted cross-entropy or, for multi-label, binary cross-entropy, and its weight."""
        return self._loss(self._logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss and the class probabilities of each row."""
        from dataclasses import replace

        logits = self._logits(model, batch)
        probabilities = (logits.sigmoid() if self.config.multi_label else logits.softmax(dim=-1)).tolist()
        names = self.facts.labels
        predictions = []
        for sample, target, row in zip(batch.samples, batch.targets.tolist(), probabilities, strict=True):
            given: Any
            chosen: Any
            if self.config.multi_label:
                given = [name for name, is_set in zip(names, target, strict=True) if is_set]
                chosen = [name for name, value in zip(names, row, strict=True) if value > 0.5]
            else:
                given, chosen = names[target], names[int(np.argmax(row))]
            values = [round(value, 6) for value in row]
            predictions.append({"sample": sample, "label": given, "prediction": chosen, "probabilities": values})
        return replace(self._loss(logits, batch), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, `accuracy`, macro `f1` and further metrics; see `scores/classes.py`."""
        from .scores.classes import measure

        loss = {"loss": float(totals.loss) / float(totals.weight)}
        return loss | measure(totals.predictions, self.facts.labels, multi_label=self.config.multi_label)

    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Compute precision, recall and F1 of each class and, for single-label, the confusion matrix."""
        from .scores.classes import describe

        return describe(totals.predictions, self.facts.labels, multi_label=self.config.multi_label)

    def class_weights(self) -> Tensor | None:
        """Return the class weights, `[labels]` float32, or None if all of them are 1.

        `balanced` is rows / (labels * rows with the label), as in `compute_class_weight` of scikit-learn. For
        multi-label, it is (rows without the label) / (rows with the label).
        """
        import torch

        wanted = self.config.class_weights
        if wanted is None:
            return None
        if wanted != "balanced":
            return torch.tensor(wanted, dtype=torch.float32)
        counts = torch.tensor(self.facts.label_counts, dtype=torch.float32).clamp(min=1)
        if self.config.multi_label:
            return (self.facts.rows - counts).clamp(min=1) / counts
        return counts.sum() / (len(counts) * counts)

    def _encode(self, row: Row, tokenizer: Any, **options: Any) -> Sequence[Example]:
        from .batches.padded import tokenize

        if not row["text"].strip() and not (row.get("text_pair") or "").strip():
            raise RowFault(EMPTY_TEXT, "remove such rows")
        several = isinstance(row["label"], list)
        if several and not self.config.multi_label and len(row["label"]) != 1:
            raise RowFault(f"the row has {len(row['label'])} labels instead of one", "set task.multi_label=true")
        labels = row["label"] if several else [row["label"]]
        numbers = [number_of(value, self.facts.labels) for value in labels]
        return [
            {**tokenize(tokenizer.tokenizer, self.facts, row["text"], row.get("text_pair"), **options), LABEL: numbers}
        ]

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits, `[n, labels]` float32."""
        logits: Tensor = model(**batch.inputs).logits
        return logits.float()[batch.positions]

    def _loss(self, logits: Tensor, batch: Batch) -> LossSum:
        import torch
        from torch.nn import functional

        weights = self.class_weights()
        weights = None if weights is None else weights.to(logits.device)
        if self.config.multi_label:
            smoothing = self.config.label_smoothing
            targets = batch.targets * (1 - smoothing) + smoothing / 2
            every = functional.binary_cross_entropy_with_logits(logits, targets, pos_weight=weights, reduction="none")
            losses, shares = every.sum(dim=1), torch.full_like(every[:, 0], every.shape[1])
        else:
            losses = functional.cross_entropy(
                logits, batch.targets, weights, reduction="none", label_smoothing=self.config.label_smoothing
            )
            shares = torch.ones_like(losses) if weights is None else weights[batch.targets]
        return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses, weights=shares)
