"""Sequence-to-sequence tasks such as translation and summarization, with encoder-decoder models."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import Seq2SeqConfig
from ..data.read.faults import EMPTY_TEXT, RowFault
from ..data.render.tokenizer import add_tokens
from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ..model.head import OutputHead


class Seq2Seq(Task):
    """The task `seq2seq`, whose samples are two sequences: the source and the target.

    Args:
        config: Task configuration.
        facts: Properties of the tokenizer and the model: padding, decoder start token, folder of the tokenizer.
        padding_free: Ignored; this task always pads.
    """

    head: OutputHead | None = None  # computes losses in chunks if set
    uses_facts: ClassVar[bool] = True

    def __init__(self, config: Seq2SeqConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: Seq2SeqConfig, facts: Facts) -> Architecture:
        """Return the architecture: an encoder-decoder model with its pretrained head."""
        return Architecture("AutoModelForSeq2SeqLM", {})

    @property
    def layout(self) -> Layout:
        """Two sequences per row, with separate length limits."""
        limits = {"max_length": self.config.max_length, "max_target_length": self.config.max_target_length}
        return Layout(
            limits, ("input_ids",), sequences=2, kept=("source", "target", "references", "prompt", "completion")
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize the source with its prefix, and the target; EOS is appended to the target if it is missing.

        Raises:
            RowFault: If the source or the target is empty.
        """
        return self._encode(row, tokenizer.tokenizer, None)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a row and truncate source and target to their limits, including special tokens such as EOS."""
        return self._encode(row, tokenizer.tokenizer, (self.config.max_length, self.config.max_target_length))

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return the number of target tokens of each sample, including EOS, `[samples]` int64."""
        lengths = table.lengths
        return np.asarray([lengths[samples[i][1][0]] for i in range(len(samples))], dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate samples into padded sources `[batch, source_len]` and decoder inputs `[batch, target_len]`.

        The positions of the targets are indices into the flattened logits, `[batch * target_len]`.
        """
        import torch

        from .batches.padded import pad_inputs, pad_rows

        assert all(len(sample.segments) == 2 for sample in samples)
        inputs = pad_inputs([sample.segments[0] for sample in samples], replace(self.facts, has_token_types=False))
        labels = [np.asarray(sample.segments[1]["input_ids"]) for sample in samples]
        # Each target is predicted from the previous ones, and the first one from the decoder start token.
        shifted = [np.concatenate([[self.facts.decoder_start_id], ids[:-1]]) for ids in labels]
        inputs["decoder_input_ids"] = pad_rows(shifted, self.facts.pad_id)
        width = inputs["decoder_input_ids"].shape[1]
        return Batch(
            inputs,
            torch.from_numpy(np.concatenate(labels).astype(np.int64)),
            torch.cat([torch.arange(len(ids)) + i * width for i, ids in enumerate(labels)]),
            torch.cat([torch.full((len(ids),), i) for i, ids in enumerate(labels)]),
            int(inputs["attention_mask"].sum()) + sum(len(ids) for ids in labels),
            tuple(sample.index for sample in samples),
        )

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the cross-entropy over the target tokens, and the number of target tokens."""
        return _sum(self._losses(model, batch, judged=False)[0], batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss, count correct tokens, and generate the text of each row if `task.metrics` are set."""
        losses, right = self._losses(model, batch, judged=True)
        predictions = self._generate(model, batch) if self.config.metrics else []
        return replace(_sum(losses, batch), counts={"right": right.sum()}, predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, `perplexity`, `token_accuracy` and those of `task.metrics`; see `scores/texts.py`."""
        from math import exp

        from .scores.texts import measure

        loss, weight = float(totals.loss) / float(totals.weight), float(totals.weight)
        accuracy = float(totals.counts["right"]) / weight
        found = {"loss": loss, "perplexity": exp(min(loss, 700)), "token_accuracy": accuracy}
        if not self.config.metrics:
            return found
        kept = [rows[prediction["origin"]] for prediction in totals.predictions]
        references = [row.get("references") or [_texts(row)[1]] for row in kept]
        return found | measure([p["prediction"] for p in totals.predictions], references, self.config.metrics)

    @cached_property
    def tokenizer(self) -> Any:
        """Tokenizer that decodes generated tokens."""
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(self.facts.tokenizer_dir)
        add_tokens(tokenizer, self.facts.new_tokens)
        return tokenizer

    def _encode(self, row: Row, tokenizer: Any, limits: tuple[int, int] | None) -> Sequence[Example]:
        source, target = _texts(row)
        if not source.strip() or not target.strip():
            raise RowFault(EMPTY_TEXT, "remove such rows")
        cut = [{"truncation": True, "max_length": limit} for limit in limits] if limits else [{}, {}]
        options = {"return_attention_mask": False, "verbose": False}
        ids = list(tokenizer(self.config.source_prefix + source, **options, **cut[0])["input_ids"])
        labels = list(tokenizer(text_target=target, **options, **cut[1])["input_ids"])
        eos = tokenizer.eos_token_id
        if eos is not None and labels[-1:] != [eos]:
            labels = [*(labels[: limits[1] - 1] if limits else labels), eos]
        return [{"input_ids": ids}, {"input_ids": labels}]

    def _losses(self, model: nn.Module, batch: Batch, *, judged: bool) -> tuple[Tensor, Tensor]:
        """Return the loss of each target, `[n]` float32, and, if `judged`, whether it is the most probable token."""
        from torch.nn import functional

        smoothing = self.config.label_smoothing
        if self.head is not None:
            width = batch.inputs["decoder_input_ids"].shape[1]
            return self.head.token_losses(model, batch, width=width, smoothing=smoothing, judged=judged)
        logits = model(**batch.inputs).logits.flatten(0, 1)[batch.positions].float()
        losses = functional.cross_entropy(logits, batch.targets, reduction="none", label_smoothing=smoothing)
        return losses, logits.argmax(dim=-1) == batch.targets

    def _generate(self, model: nn.Module, batch: Batch) -> list[dict[str, Any]]:
        import torch
        from torch import distributed

        whole: Any = model if hasattr(model, "generate") else model.module
        # With sharded weights, a rank that has finished must continue its forward passes until all ranks have finished.
        synced = distributed.is_initialized() and distributed.get_world_size() > 1
        with torch.no_grad():
            ids = whole.generate(
                input_ids=batch.inputs["input_ids"],
                attention_mask=batch.inputs["attention_mask"],
                max_new_tokens=self.config.max_new_tokens or self.config.max_target_length,
                num_beams=self.config.num_beams,
                do_sample=False,
                synced_gpus=synced,
            )
        texts = self.tokenizer.batch_decode(ids, skip_special_tokens=True)
        labels = [batch.targets[batch.documents == i] for i in range(len(batch.samples))]
        given = [self.tokenizer.decode(label.tolist(), skip_special_tokens=True) for label in labels]
        # Evaluation neither packs nor drops rows, so the index of a sample is also the index of its row.
        return [
            {"sample": sample, "origin": sample, "prediction": text.strip(), "label": label.strip()}
            for sample, text, label in zip(batch.samples, texts, given, strict=False)
        ]


def _sum(losses: Tensor, batch: Batch) -> LossSum:
    return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses)


def _texts(row: Row) -> tuple[str, str]:
    """Return the source and the target of a row in either format.

    Raises:
        RowFault: If the row consists of messages.
    """
    if "messages" in row:
        raise RowFault("prompt and completion are lists of messages", "provide both as text")
    return (row["source"], row["target"]) if "source" in row else (row["prompt"], row["completion"])
