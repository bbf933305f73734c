"""A tag for each word, learned on the word's first piece: named entities, parts of speech."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import TokenClassificationConfig
from ..data.read.faults import RowFault
from ..data.read.formats import IGNORED_LABEL
from ..data.render.labels import NO_LABEL, OUTSIDE, head_settings, number_of
from ..data.store.pack import count_labels
from ..errors import RequestError
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample, Task

if TYPE_CHECKING:
    from torch import Tensor, nn


LABELS = "labels"  # token column: the tag's number on the first piece of each word
TAGS = "tags"  # row column: the tag's number of every word, also of those that have no token
WORDS = "words"  # row column: which word each label is of


@dataclass(frozen=True)
class TaggedBatch(Batch):
    """A micro-batch that knows the words behind its targets."""

    tags: tuple[tuple[int, ...], ...] = ()  # of each document: the tag's number of every word
    words: tuple[int, ...] = ()  # [n]: which of its document's words each target is of


class TokenClassification(Task):
    """The task `token_classification`.

    Words that have no token, because they were cut off or a tokenizer knows nothing in them, are neither learned nor
    asked for; scores count them as predicted `O`, so that every split keeps its words whatever `max_length` is.

    Args:
        config: the task's keys.
        facts: of the data: labels, padding.
        padding_free: not possible here.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: TokenClassificationConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts
        self._lead: str | None = None

    @staticmethod
    def architecture(config: TokenClassificationConfig, facts: Facts) -> Architecture:
        """A head with an output for each tag, whose names go into config.json."""
        return Architecture("AutoModelForTokenClassification", head_settings(facts), new_head=True)

    @staticmethod
    def labels_of(row: Row) -> Iterable[tuple[int | str, str | None]]:
        """The tags of the row's words that are given."""
        return [(tag, None) for tag in row["tags"] if tag not in (None, "", NO_LABEL, IGNORED_LABEL)]

    @property
    def layout(self) -> Layout:
        """A row is a sequence with labels beside its tokens and the tags of its words."""
        from .batches.padded import input_columns

        columns = (*input_columns(self.facts), LABELS)
        return Layout({"max_length": self.config.max_length}, columns, (TAGS, WORDS))

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The words' pieces, each word's tag on its first one.

        Raises:
            RequestError: the tokenizer does not tell which word a token is of.
            RowFault: there are no words, no word has a token, or a tag is missing or unknown.
        """
        return self._encode(row, tokenizer.tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """At most `max_length` tokens, special ones included."""
        return self._encode(row, tokenizer.tokenizer, truncation=True, max_length=self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: words with a token."""
        return count_labels(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Padded rows; targets [n] label numbers of the words, at the flat place of each word's first piece."""
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
        """Sum of the words' cross-entropies."""
        return self._loss(self._logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with the tags of each row's words, given and predicted."""
        from dataclasses import replace

        assert isinstance(batch, TaggedBatch)
        logits, names = self._logits(model, batch), self.facts.labels
        predictions = [
            {"sample": sample, "tags": [names[tag] for tag in tags], "prediction": [OUTSIDE] * len(tags)}
            for sample, tags in zip(batch.samples, batch.tags, strict=False)  # no samples without targets
        ]
        found = logits.argmax(dim=-1).tolist()
        for document, word, number in zip(batch.documents.tolist(), batch.words, found, strict=False):
            predictions[document]["prediction"][word] = names[number]
        return replace(self._loss(logits, batch), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """loss, accuracy of words, and precision, recall, f1 of entities; see entities.py."""
        from .scores.entities import measure

        return {"loss": float(totals.loss) / float(totals.weight)} | measure(totals.predictions, self.facts.labels)

    def details(self, totals: LossSum, rows: Sequence[Row]) -> Mapping[str, Any]:
        """Precision, recall and F1 of every type of entity."""
        from .scores.entities import describe

        return describe(totals.predictions, self.facts.labels)

    def _encode(self, row: Row, tokenizer: Any, **options: Any) -> Sequence[Example]:
        from .batches.padded import input_columns

        if not row["tokens"]:
            raise RowFault("it has no words", "leave such rows out")
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
            raise RowFault("no word has a token", "leave such rows out, or see task.max_length")
        columns = {name: list(encoded[name]) for name in input_columns(self.facts)}
        return [{**columns, LABELS: labels, TAGS: tags, WORDS: words}]

    def _find_lead(self, tokenizer: Any) -> str:
        """What stands before a word: a space where the tokenizer would else join words to one.

        Byte-level tokenizers (GPT-2, RoBERTa, Qwen) tell a word in a sentence from the first one by its space, which
        `add_prefix_space` gives to GPT-2's and RoBERTa's only; others add what they need.

        Raises:
            RequestError: the tokenizer does not tell which word a token is of.
        """
        if self._lead is None:
            if not tokenizer.is_fast:
                way_out = "set model.tokenizer to one with a tokenizer.json"
                raise RequestError.of(
                    "model.tokenizer", "a slow tokenizer does not tell which word a token is of", way_out
                )
            ids = tokenizer(["a", "a"], is_split_into_words=True, add_special_tokens=False)["input_ids"]
            self._lead = "" if " " in tokenizer.decode(ids).strip() else " "
        return self._lead

    def _logits(self, model: nn.Module, batch: Batch) -> Tensor:
        """[n, labels] float32."""
        width = batch.inputs["input_ids"].shape[1]  # a method may have put virtual tokens in front
        logits: Tensor = model(**batch.inputs).logits[:, -width:]
        return logits.flatten(0, 1)[batch.positions].float()

    def _loss(self, logits: Tensor, batch: Batch) -> LossSum:
        from torch.nn import functional

        smoothing = self.config.label_smoothing
        losses = functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
        return LossSum(losses.sum(), losses.new_tensor(batch.loss_weight), losses=losses)
