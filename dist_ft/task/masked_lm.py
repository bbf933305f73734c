"""Masked language modelling: tokens are hidden, and predicted from all that stands around them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import MaskedLMConfig
from ..data.read.faults import EMPTY_TEXT, RowFault
from ..errors import RequestError
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample, Task
from .batches.masks import draw_masks, share_of

if TYPE_CHECKING:
    from torch import Tensor, nn


WORDS = "word_ids"  # which word of its row a token belongs to; -1 of special tokens


class MaskedLM(Task):
    """The task `masked_lm`.

    Packed, documents are cut one after another into blocks with the tokenizer's special tokens at both ends. Attention
    goes over the whole block, so its documents see each other, as in RoBERTa's FULL-SENTENCES (Liu et al. 2019).
    What is hidden is drawn when a batch is put together: see masks.py. Evaluation always takes the first draw.

    Args:
        config: the task's keys.
        facts: of the tokenizer: mask, special tokens, padding.
        padding_free: not possible here.
        seed: of the masks; `train.seed`.
    """

    uses_facts: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True

    def __init__(self, config: MaskedLMConfig, facts: Facts, *, padding_free: bool = False, seed: int = 0) -> None:
        self.config = config
        self.facts = facts
        self.seed = seed
        self.candidates = np.setdiff1d(np.arange(facts.vocabulary), facts.special_ids)

    @staticmethod
    def architecture(config: MaskedLMConfig, facts: Facts) -> Architecture:
        """A head over the vocabulary, the model's own unless it is to begin anew."""
        return Architecture("AutoModelForMaskedLM", new_head=config.new_head)

    @property
    def layout(self) -> Layout:
        """Blocks, or a sequence a row; a block leaves room for the special tokens around it."""
        frame = len(self.facts.prefix_ids) + len(self.facts.suffix_ids) if self.config.packing else 0
        limits = {"max_length": self.config.max_length - frame}
        return Layout(limits, ("input_ids", WORDS), cuts_blocks=self.config.packing)

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The text's tokens and the words they belong to; special tokens stand around it unless blocks are cut.

        Raises:
            RowFault: there is no token in the text.
            RequestError: the tokenizer has no mask token, or does not tell words.
        """
        return self._encode(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """At most `max_length` tokens, special ones included."""
        return self._encode(row, tokenizer, truncation=True, max_length=self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: tokens that are hidden; with `whole_word` about so many, as words differ in length."""
        maskable = self._maskable(np.asarray(table.columns["input_ids"]), np.asarray(table.columns[WORDS]))
        ends = np.concatenate(([0], np.cumsum(maskable, dtype=np.int64)))
        origins = table.offsets[samples.rows]
        pieces = ends[origins + samples.stops] - ends[origins + samples.starts]
        counts = np.diff(np.concatenate(([0], np.cumsum(pieces)))[samples.offsets])
        return np.array([share_of(int(count), self.config.mlm_probability) for count in counts], dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Padded rows with hidden tokens; targets [n] are what they were."""
        import torch

        from .batches.padded import pad_rows

        hidden, targets, rows, columns = [], [], [], []
        for number, sample in enumerate(samples):
            ids, chosen = self._hide(sample)
            hidden.append(ids[0])
            targets.append(ids[1][chosen])
            columns.append(chosen)
            rows.append(np.full(len(chosen), number))
        inputs = {
            "input_ids": pad_rows(hidden, self.facts.pad_id),
            "attention_mask": pad_rows([np.ones(len(ids)) for ids in hidden], 0),
        }
        documents = torch.from_numpy(np.concatenate(rows).astype(np.int64))
        positions = documents * inputs["input_ids"].shape[1] + torch.from_numpy(np.concatenate(columns))
        tokens = sum(map(len, hidden))
        flat = torch.from_numpy(np.concatenate(targets).astype(np.int64))
        return Batch(inputs, flat, positions, documents, tokens, tuple(sample.index for sample in samples))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sum of cross-entropies (float32) of the hidden tokens, and their number."""
        return _loss(_logits(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss, with how many hidden tokens the model would have put back."""
        from dataclasses import replace

        logits = _logits(model, batch)
        right = (logits.argmax(dim=-1) == batch.targets).sum()
        return replace(_loss(logits, batch), counts={"correct_tokens": right})

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """loss, perplexity (of hidden tokens, hence no likelihood of texts), token_accuracy."""
        from .batches.tokens import metrics_of

        return metrics_of(totals, exact=False)

    def _encode(self, row: Row, tokenizer: Any, **options: Any) -> Sequence[Example]:
        if self.facts.mask_id is None:
            rule = "the tokenizer has no mask token, so nothing can be hidden"
            raise RequestError.of("task", rule, "name a model that has one, or choose task=causal_lm")
        inner = tokenizer.tokenizer
        if self.config.whole_word and not inner.is_fast:
            rule = "the tokenizer does not tell which tokens make a word (it is no fast one)"
            raise RequestError.of("task.whole_word", rule, "set it to false, or give a folder with tokenizer.json")
        encoded = inner(
            row["text"],
            add_special_tokens=not self.config.packing,
            return_special_tokens_mask=True,
            verbose=False,
            **options,
        )
        special = encoded["special_tokens_mask"]
        if not row["text"].strip() or all(special):
            raise RowFault(EMPTY_TEXT, "leave such rows out")
        known = encoded.word_ids() if inner.is_fast else range(len(special))
        words = [-1 if mark or word is None else word for mark, word in zip(special, known, strict=True)]
        return [{"input_ids": list(encoded["input_ids"]), WORDS: words}]

    def _maskable(self, ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """[tokens] bool: neither put there by the tokenizer nor special where they stand in the text."""
        return (words >= 0) & ~np.isin(ids, self.facts.special_ids)

    def _hide(self, sample: Sample) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """A sample's tokens with and without masks, each [T], and the places [n] that are to be predicted."""
        ids = np.concatenate([segment["input_ids"] for segment in sample.segments]).astype(np.int64)
        words = np.concatenate([segment[WORDS] for segment in sample.segments]).astype(np.int64)
        pieces = np.repeat(np.arange(len(sample.segments)), [len(s["input_ids"]) for s in sample.segments])
        places = np.flatnonzero(self._maskable(ids, words))
        # a number of its own for each word of the block; without whole_word every token is one
        groups = np.unique(np.stack([pieces, words])[:, places], axis=1, return_inverse=True)[1].reshape(-1)
        units = groups if self.config.whole_word else np.arange(len(places))
        assert self.facts.mask_id is not None, "no row is encoded without one"
        drawn = draw_masks(units, self.config.mlm_probability, (self.seed, sample.index, sample.draw))
        chosen = places[drawn.chosen]
        hidden = ids.copy()
        assert self.facts.mask_id is not None, "prepare refuses a tokenizer without one"
        hidden[chosen[drawn.masked]] = self.facts.mask_id
        hidden[chosen[drawn.replaced]] = self.candidates[drawn.words[drawn.replaced] % len(self.candidates)]
        if not self.config.packing:
            return (hidden, ids), chosen
        before, behind = (np.array(part, dtype=np.int64) for part in (self.facts.prefix_ids, self.facts.suffix_ids))
        framed = (np.concatenate([before, hidden, behind]), np.concatenate([before, ids, behind]))
        return framed, chosen + len(before)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """[n, vocabulary] float32 at the hidden tokens."""
    width = batch.inputs["input_ids"].shape[1]  # a method may have put virtual tokens in front
    logits: Tensor = model(**batch.inputs).logits[:, -width:]
    return logits.flatten(0, 1)[batch.positions].float()


def _loss(logits: Tensor, batch: Batch) -> LossSum:
    from torch.nn import functional

    losses = functional.cross_entropy(logits, batch.targets, reduction="none")
    return LossSum(losses.sum(), losses.new_tensor(float(batch.supervised)), losses=losses)
