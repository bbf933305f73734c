"""Reward modeling: a score for answers is learned from pairs of a preferred and a rejected answer.

The loss of a pair is -log sigmoid(score_chosen - score_rejected) (Bradley and Terry 1952; Ouyang et al. 2022, eq. 1)
plus `center_rewards_coefficient` * (score_chosen + score_rejected)² (Eisenstein et al. 2023, section 2), as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import RewardConfig
from ..data.read.faults import RowFault
from ..protocols import Task
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample
from .batches.pairs import EQUAL, cut_pair, encode_pair

if TYPE_CHECKING:
    from torch import Tensor, nn


MEANS = ("accuracy", "margin", "mean_reward")  # means over pairs, with the metric names of TRL


class Reward(Task):
    """The task `reward`, whose samples are two sequences: the prompt with the chosen and with the rejected answer.

    The head is the sequence classification head of transformers with a single label. It reads the first token of an
    encoder, or the last token of a decoder that is not padding.

    Args:
        config: Task configuration.
        facts: Properties of the tokenizer: padding and token types.
        padding_free: Ignored; this task always pads.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: RewardConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: RewardConfig, facts: Facts) -> Architecture:
        """Return the architecture: a newly initialized head with one output."""
        overrides = {"num_labels": 1, "pad_token_id": facts.pad_id}
        return Architecture("AutoModelForSequenceClassification", overrides, new_head=True)

    @property
    def layout(self) -> Layout:
        """Two sequences per row, which do not attend to each other."""
        from .batches.padded import input_columns

        return Layout({"max_length": self.config.max_length}, input_columns(self.facts), sequences=2, apart=True)

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a pair; see `encode_pair`.

        If the tokenizer has token types or no EOS token (such as that of BERT), prompt and answer are tokenized as a
        pair of texts.

        Raises:
            RowFault: If an answer is empty, or both answers are the same.
        """
        if not self._marks_pairs(row, tokenizer):
            return [{"input_ids": one["input_ids"]} for one in encode_pair(row, tokenizer)]
        return self._encode_marked(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a pair and truncate both sequences to `max_length` tokens.

        If prompt and answer are tokenized as a pair of texts, the longer of them is truncated.

        Raises:
            RowFault: If the truncated sequences are identical.
        """
        if not self._marks_pairs(row, tokenizer):
            return cut_pair(self.encode(row, tokenizer), self.config.max_length)
        cut = self._encode_marked(row, tokenizer, truncation=True, max_length=self.config.max_length)
        return cut_pair(cut, self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return 1 for each sample, `[samples]` int64: each pair is one term of the loss."""
        return np.ones(len(samples), dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate pairs into padded rows, `[2 * pairs, seq_len]`; `positions` holds the rows of pairs, `[pairs, 2]`."""
        import torch

        from .batches.padded import pad_inputs

        inputs = pad_inputs([segment for sample in samples for segment in sample.segments], self.facts)
        pairs = len(inputs["input_ids"]) // 2
        places = torch.arange(pairs)
        tokens = int(inputs["attention_mask"].sum())
        positions = torch.arange(2 * pairs).view(pairs, 2)
        indices = tuple(sample.index for sample in samples)
        return Batch(inputs, places, positions, places, tokens, indices, float(len(samples)))

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the losses of the pairs, and the number of pairs."""
        return self._loss(self._scores(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss, the sums that `metrics` needs, and the scores of both answers of each pair."""
        scores = self._scores(model, batch)
        chosen, rejected = scores.double().unbind(1)
        sums = ((chosen > rejected).double(), chosen - rejected, (chosen + rejected) / 2)
        predictions = [
            {"sample": sample, "reward_chosen": one, "reward_rejected": other}
            for sample, (one, other) in zip(batch.samples, scores.tolist(), strict=True)
        ]
        counts = {name: values.sum() for name, values in zip(MEANS, sums, strict=True)}
        return replace(self._loss(scores, batch), counts=counts, predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss`, `accuracy` (fraction of pairs with a higher chosen score), `margin` and `mean_reward`."""
        pairs = float(totals.weight)
        return {"loss": float(totals.loss) / pairs} | {name: float(totals.counts[name]) / pairs for name in MEANS}

    def _marks_pairs(self, row: Row, tokenizer: Any) -> bool:
        return isinstance(row["prompt"], str) and (self.facts.has_token_types or tokenizer.eos_id is None)

    def _encode_marked(self, row: Row, tokenizer: Any, **options: Any) -> list[Example]:
        from .batches.padded import tokenize

        answers = (row["chosen"], row["rejected"])
        if answers[0] == answers[1]:
            raise RowFault(EQUAL, "remove such pairs")
        if not all(answer.strip() for answer in answers):
            raise RowFault("an answer is empty", "remove such pairs")
        return [tokenize(tokenizer.tokenizer, self.facts, row["prompt"], answer, **options) for answer in answers]

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the scores of the chosen and the rejected answers, `[pairs, 2]` float32."""
        logits: Tensor = model(**batch.inputs).logits
        return logits.float().squeeze(-1)[batch.positions]

    def _loss(self, scores: Tensor, batch: Batch) -> LossSum:
        from torch.nn.functional import logsigmoid

        losses = -logsigmoid(scores[:, 0] - scores[:, 1])
        losses = losses + self.config.center_rewards_coefficient * scores.sum(dim=1).square()
        return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses)
