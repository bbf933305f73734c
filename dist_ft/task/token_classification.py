"""Token classification, such as named entity recognition: each word has a tag, predicted at its first token."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import TokenClassificationConfig
from ..data.read.faults import RowFault
from ..data.read.formats import IGNORED_LABEL, NO_LABEL
from ..data.render.labels import OUTSIDE, head_settings, number_of
from ..data.store.pack import count_labels
from ..errors import RequestError
from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample

if TYPE_CHECKING:
    from torch import Tensor, nn


LABELS = "labels"  # token column: index of the tag at the first token of each word
TAGS = "tags"  # row column: index of the tag of every word, including words without a token
WORDS = "words"  # row column: index of the word that each label belongs to


@dataclass(frozen=True)
class TaggedBatch(Batch):
    """Micro-batch with the words that its targets belong to."""

    tags: tuple[tuple[int, ...], ...] = ()  # tag index of every word, per document
    words: tuple[int, ...] = ()  # [n] index, in its document, of the word that each target belongs to


class TokenClassification(Task):
    """The task `token_classification`.

    Words without a token, because they were truncated or the tokenizer produces none for them, do not enter the loss.
    Metrics count them as predicted `O`, so that the words of a split do not depend on `max_length`.

    Args:
        config: Task configuration.
        facts: Properties of the data and the tokenizer: labels and padding.
        padding_free: Ignored; this task always pads.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: TokenClassificationConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts
        self._lead: str | None = None

    @staticmethod
    def architecture(config: TokenClassificationConfig, facts: Facts) -> Architecture:
        """Return the architecture: a newly initialized head with one output per tag; config.json gets the tags."""
        return Architecture("AutoModelForTokenClassification", head_settings(facts), new_head=True)

    @staticmethod
    def labels_of(row: Row) -> Iterable[tuple[int | str, str | None]]:
        """Return the tags of the words of a row; missing and ignored tags are skipped."""
        return [(tag, None) for tag in row["tags"] if tag not in (None, "", NO_LABEL, IGNORED_LABEL)]

    @property
    def layout(self) -> Layout:
        """One sequence per row, with the labels of its tokens and the tags of its words."""
        from .batches.padded import input_columns

        columns = (*input_columns(self.facts), LABELS)
        return Layout({"max_length": self.config.max_length}, columns, (TAGS, WORDS))

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize the words of a row; the label at the first token of each word is its tag.

        Raises:
            RequestError: If the tokenizer does not provide word IDs.
            RowFault: If the row has no words, no word has a token, or a tag is missing or unknown.
        """
        return self._encode(row, tokenizer.tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row and truncate it to `max_length` tokens, including special tokens."""
        return self._encode(row, tokenizer.tokenizer, truncation=True, max_length=self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return the number of words with a token in each sample, `[samples]` int64."""
        return count_labels(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples into padded rows; targets are the tag indices of the words that have a token, `[n]`."""
        import torch

        from .batches.padded import only_segments, pad_inputs, pad_rows

        segments = only_segments(samples)
        inputs = pad_inputs(segments, self.facts)
        labels = pad_rows([segment[LABELS] for segment in segments], IGNORED_LABEL)
        flat = labels.flatten()
        positions = torch.nonzero(flat != IGNORED_LABEL).squeeze(1)
        return TaggedBatch(
            inputs,
            flat[positions],
            positions,
            positions // labels.shape[1],
            tokens=int(inputs["attention_mask"].sum()),
            samples=tuple(sample.index for sample in samples),
            tags=tuple(tuple(segment[TAGS].tolist()) for segment in segments),
            words=tuple(word for segment in segments for word in segment[WORDS].tolist()),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the cross-entropy over words, and the number of words."""
        return self._loss(self._logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss and the predicted tags of the words of each row."""
        from dataclasses import replace

        assert isinstance(batch, TaggedBatch)
        logits, names = self._logits(model, batch), self.facts.labels
        predictions = [
            {"sample": sample, "tags": [names[tag] for tag in tags], "prediction": [OUTSIDE] * len(tags)}
            for sample, tags in zip(batch.samples, batch.tags, strict=False)  # a batch without targets has no samples
        ]
        found = logits.argmax(dim=-1).tolist()
        for document, word, number in zip(batch.documents.tolist(), batch.words, found, strict=False):
            predictions[document]["prediction"][word] = names[number]
        return replace(self._loss(logits, batch), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, word `accuracy`, and `precision`, `recall` and `f1` of entities; see `scores/entities.py`."""
        from .scores.entities import measure

        return {"loss": float(totals.loss) / float(totals.weight)} | measure(totals.predictions, self.facts.labels)

    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Compute precision, recall and F1 of each entity type, or of each tag if the tags are not of an IOB scheme."""
        from .scores.entities import describe

        return describe(totals.predictions, self.facts.labels)

    def _encode(self, row: Row, tokenizer: Any, **options: Any) -> Sequence[Example]:
        from .batches.padded import input_columns

        if not row["tokens"]:
            raise RowFault("the row has no words", "remove such rows")
        tags = [number_of(tag, self.facts.labels) for tag in row["tags"]]
        lead = self._find_lead(tokenizer)
        spaced = [lead + word if word.strip() else word for word in row["tokens"]]
        encoded = tokenizer(spaced, is_split_into_words=True, return_attention_mask=False, verbose=False, **options)
        labels: list[int] = []
        words: list[int] = []
        for word in encoded.word_ids(0):
            begins = word is not None and (not words or word != words[-1])
            labels.append(tags[word] if begins else IGNORED_LABEL)
            if begins:
                words.append(word)
        if not words:
            raise RowFault("no word has a token", "remove such rows, or raise task.max_length")
        columns = {name: list(encoded[name]) for name in input_columns(self.facts)}
        return [{**columns, LABELS: labels, TAGS: tags, WORDS: words}]

    def _find_lead(self, tokenizer: Any) -> str:
        """Return the prefix of each word: a space if the tokenizer would otherwise join the words, else nothing.

        Byte-level tokenizers (GPT-2, RoBERTa, Qwen) encode a word inside a sentence with the space before it, but only
        those of GPT-2 and RoBERTa have the option `add_prefix_space`. Other tokenizers separate words themselves.

        Raises:
            RequestError: If the tokenizer does not provide word IDs.
        """
        if self._lead is None:
            if not tokenizer.is_fast:
                way_out = "set it to a folder with tokenizer.json"
                raise RequestError.of(
                    "model.tokenizer",
                    "a slow tokenizer is not supported with task=token_classification: it provides no word IDs",
                    way_out,
                )
            ids = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
            self._lead = "" if " " in tokenizer.decode(ids).strip() else " "
        return self._lead

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the logits at the targets, `[n, labels]` float32."""
        width = batch.inputs["input_ids"].shape[1]  # the method may have prepended virtual tokens
        logits: Tensor = model(**batch.inputs).logits[:, -width:]
        return logits.flatten(0, 1)[batch.positions].float()

    def _loss(self, logits: Tensor, batch: Batch) -> LossSum:
        from torch.nn import functional

        smoothing = self.config.label_smoothing
        losses = functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
        return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses)
