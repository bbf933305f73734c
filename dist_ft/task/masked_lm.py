"""Masked language modeling: randomly selected tokens are masked and predicted from the tokens on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import MaskedLMConfig
from ..data.read.faults import EMPTY_TEXT, RowFault
from ..errors import RequestError
from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample
from .batches.masks import draw_masks, share_of

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..model.head import OutputHead


WORDS = "word_ids"  # token column: index of the token's word in its row; -1 for special tokens


class MaskedLM(Task):
    """The task `masked_lm`.

    With packing, documents are concatenated and cut into blocks, and each block is wrapped in the special tokens of the
    tokenizer. Attention covers the whole block, so its documents attend to each other, as in the FULL-SENTENCES format
    of RoBERTa (Liu et al. 2019). Masks are drawn when a batch is collated, see `batches/masks.py`; evaluation always
    uses the first draw.

    Args:
        config: Task configuration.
        facts: Properties of the tokenizer: mask token, special tokens and padding.
        padding_free: Ignored; this task always pads.
        seed: Seed of the masks, `train.seed`.
    """

    head: OutputHead | None = None  # computes losses in chunks if set
    uses_facts: ClassVar[bool] = True
    uses_seed: ClassVar[bool] = True

    def __init__(self, config: MaskedLMConfig, facts: Facts, *, padding_free: bool = False, seed: int = 0) -> None:
        self.config = config
        self.facts = facts
        self.seed = seed
        self.candidates = np.setdiff1d(np.arange(facts.vocabulary), facts.special_ids)

    @staticmethod
    def architecture(config: MaskedLMConfig, facts: Facts) -> Architecture:
        """Return the architecture: a masked language model, whose head is newly initialized with `task.new_head`."""
        return Architecture("AutoModelForMaskedLM", new_head=config.new_head)

    @property
    def layout(self) -> Layout:
        """Blocks with packing, else one sequence per row; blocks leave room for the special tokens around them."""
        frame = len(self.facts.prefix_ids) + len(self.facts.suffix_ids) if self.config.packing else 0
        limits = {"max_length": self.config.max_length - frame}
        return Layout(limits, ("input_ids", WORDS), cuts_blocks=self.config.packing)

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a text; special tokens are added unless documents are packed into blocks.

        Raises:
            RowFault: If the text is empty or has no tokens.
            RequestError: If the tokenizer has no mask token, or does not provide the word IDs for whole-word masking.
        """
        return self._encode(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a text and truncate it to `max_length` tokens, including special tokens."""
        return self._encode(row, tokenizer, truncation=True, max_length=self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return the number of tokens to predict in each sample, `[samples]` int64.

        With `whole_word`, it is an estimate, because words differ in length.
        """
        maskable = self._maskable(np.asarray(table.columns["input_ids"]), np.asarray(table.columns[WORDS]))
        ends = np.concatenate(([0], np.cumsum(maskable, dtype=np.int64)))
        origins = table.offsets[samples.rows]
        pieces = ends[origins + samples.stops] - ends[origins + samples.starts]
        counts = np.diff(np.concatenate(([0], np.cumsum(pieces)))[samples.offsets])
        return np.array([share_of(int(count), self.config.mlm_probability) for count in counts], dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Mask samples and collate them into padded rows; targets are the original IDs of selected tokens, `[n]`."""
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
        """Compute the sum of the cross-entropy over the selected tokens, in float32, and the number of these tokens."""
        return _sum(self._losses(model, batch, judged=False)[0], batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss and count the selected tokens that are predicted correctly."""
        from dataclasses import replace

        losses, right = self._losses(model, batch, judged=True)
        return replace(_sum(losses, batch), counts={"correct_tokens": right.sum()})

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, `perplexity` and `token_accuracy` over the selected tokens.

        The perplexity is not that of texts, because it covers only the selected tokens.
        """
        from .batches.tokens import metrics_of

        return metrics_of(totals, exact=False)

    def _losses(self, model: nn.Module, batch: Batch, *, judged: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of each selected token, `[n]` float32, and, if `judged`, whether it is predicted, `[n]`."""
        from torch.nn import functional

        if self.head is not None:
            width = batch.inputs["input_ids"].shape[1]
            return self.head.token_losses(model, batch, width=width, judged=judged)
        logits = _logits(model, batch)
        return functional.cross_entropy(logits, batch.targets, reduction="none"), logits.argmax(dim=-1) == batch.targets

    def _encode(self, row: Row, tokenizer: Any, **options: Any) -> Sequence[Example]:
        if self.facts.mask_id is None:
            rule = "the tokenizer has no mask token, which task=masked_lm requires"
            raise RequestError.of("task", rule, "set model.name_or_path to a model that has one, or task=causal_lm")
        inner = tokenizer.tokenizer
        if self.config.whole_word and not inner.is_fast:
            rule = "whole-word masking is not supported with a slow tokenizer, which provides no word IDs"
            raise RequestError.of("task.whole_word", rule, "set it to false, or use a folder with tokenizer.json")
        encoded = inner(
            row["text"],
            add_special_tokens=not self.config.packing,
            return_special_tokens_mask=True,
            verbose=False,
            **options,
        )
        special = encoded["special_tokens_mask"]
        if not row["text"].strip() or all(special):
            raise RowFault(EMPTY_TEXT, "remove such rows")
        known = encoded.word_ids() if inner.is_fast else range(len(special))
        words = [-1 if mark or word is None else word for mark, word in zip(special, known, strict=True)]
        return [{"input_ids": list(encoded["input_ids"]), WORDS: words}]

    def _maskable(self, ids: np.ndarray, words: np.ndarray) -> np.ndarray:
        """Return which tokens may be masked, `[tokens]` bool: all but special tokens, also those in the text itself."""
        return (words >= 0) & ~np.isin(ids, self.facts.special_ids)

    def _hide(self, sample: Sample) -> tuple[tuple[np.ndarray, np.ndarray], np.ndarray]:
        """Return the masked and the original token IDs of a sample, `[tokens]`, and the selected positions, `[n]`."""
        ids = np.concatenate([segment["input_ids"] for segment in sample.segments]).astype(np.int64)
        words = np.concatenate([segment[WORDS] for segment in sample.segments]).astype(np.int64)
        pieces = np.repeat(np.arange(len(sample.segments)), [len(s["input_ids"]) for s in sample.segments])
        places = np.flatnonzero(self._maskable(ids, words))
        # Word IDs start again in every document of a block, so words are numbered by (document, word ID).
        groups = np.unique(np.stack([pieces, words])[:, places], axis=1, return_inverse=True)[1].reshape(-1)
        units = groups if self.config.whole_word else np.arange(len(places))
        assert self.facts.mask_id is not None, "rows are only encoded with a mask token"
        drawn = draw_masks(units, self.config.mlm_probability, (self.seed, sample.index, sample.draw))
        chosen = places[drawn.chosen]
        hidden = ids.copy()
        assert self.facts.mask_id is not None, "data preparation requires a mask token"
        hidden[chosen[drawn.masked]] = self.facts.mask_id
        hidden[chosen[drawn.replaced]] = self.candidates[drawn.words[drawn.replaced] % len(self.candidates)]
        if not self.config.packing:
            return (hidden, ids), chosen
        before, behind = (np.array(part, dtype=np.int64) for part in (self.facts.prefix_ids, self.facts.suffix_ids))
        framed = (np.concatenate([before, hidden, behind]), np.concatenate([before, ids, behind]))
        return framed, chosen + len(before)


def _logits(model: nn.Module, batch: Batch) -> Tensor:
    """Return the logits at the selected tokens, `[n, vocab_size]` float32."""
    width = batch.inputs["input_ids"].shape[1]  # the method may have prepended virtual tokens
    logits: Tensor = model(**batch.inputs).logits[:, -width:]
    return logits.flatten(0, 1)[batch.positions].float()


def _sum(losses: Tensor, batch: Batch) -> LossSum:
    return LossSum(losses.sum(), losses.new_full((), float(batch.supervised)), losses=losses)
