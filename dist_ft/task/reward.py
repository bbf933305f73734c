"""Reward modelling: a score for an answer, learned from which of two was preferred.

The loss of a pair is -log sigmoid(score of the chosen - score of the rejected) (Bradley and Terry 1952; Ouyang et al.
2022, eq. 1), and with `center_rewards_coefficient` c times the squared sum of both besides (Eisenstein et al. 2023,
section 2), as in TRL.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from ..config.task import RewardConfig
from ..data.read.faults import RowFault
from ..state import Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample, Task
from .batches.pairs import EQUAL, cut_pair, encode_pair

if TYPE_CHECKING:
    from torch import Tensor, nn


MEANS = ("accuracy", "margin", "mean_reward")  # TRL's names


class Reward(Task):
    """The task `reward`: a sample is two sequences, the prompt with its chosen and with its rejected answer.

    The head is transformers' for one label: it reads an encoder's first token, or a decoder's last one that is no
    padding.

    Args:
        config: the task's keys.
        facts: of the data: padding.
        padding_free: not possible here.
    """

    uses_facts: ClassVar[bool] = True

    def __init__(self, config: RewardConfig, facts: Facts, *, padding_free: bool = False) -> None:
        self.config = config
        self.facts = facts

    @staticmethod
    def architecture(config: RewardConfig, facts: Facts) -> Architecture:
        """A head with one output."""
        overrides = {"num_labels": 1, "pad_token_id": facts.pad_id}
        return Architecture("AutoModelForSequenceClassification", overrides, new_head=True)

    @property
    def layout(self) -> Layout:
        """Two sequences a row that never see each other."""
        from .batches.padded import input_columns

        return Layout({"max_length": self.config.max_length}, input_columns(self.facts), sequences=2, apart=True)

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """See pairs.py; where the tokenizer marks the texts of a pair (BERT), prompt and answer are such a pair.

        Raises:
            RowFault: an answer is empty, or both are the same.
        """
        if not self._marks_pairs(row, tokenizer):
            return [{"input_ids": one["input_ids"]} for one in encode_pair(row, tokenizer)]
        return self._encode_marked(row, tokenizer)

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The first `max_length` tokens of each; of a marked pair of texts the longer one is cut.

        Raises:
            RowFault: nothing is left in which they differ.
        """
        if not self._marks_pairs(row, tokenizer):
            return cut_pair(self.encode(row, tokenizer), self.config.max_length)
        cut = self._encode_marked(row, tokenizer, truncation=True, max_length=self.config.max_length)
        return cut_pair(cut, self.config.max_length)

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: each is one comparison."""
        return np.ones(len(samples), dtype=np.int64)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Padded rows [2 * pairs, T], a pair's one after the other; `positions` [pairs, 2] are their numbers."""
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
        """Sum of the pairs' losses, and their number."""
        return self._loss(self._scores(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with sums for `metrics`, and both scores of each pair."""
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
        """loss, accuracy (the chosen answer has the higher score), margin, mean_reward."""
        pairs = float(totals.weight)
        return {"loss": float(totals.loss) / pairs} | {name: float(totals.counts[name]) / pairs for name in MEANS}

    def _marks_pairs(self, row: Row, tokenizer: Any) -> bool:
        return isinstance(row["prompt"], str) and (self.facts.has_token_types or tokenizer.eos_id is None)

    def _encode_marked(self, row: Row, tokenizer: Any, **options: Any) -> list[Example]:
        from .batches.padded import tokenize

        answers = (row["chosen"], row["rejected"])
        if answers[0] == answers[1]:
            raise RowFault(EQUAL, "leave such pairs out")
        if not all(answer.strip() for answer in answers):
            raise RowFault("an answer is empty", "leave such pairs out")
        return [tokenize(tokenizer.tokenizer, self.facts, row["prompt"], answer, **options) for answer in answers]

    def _scores(self, model: nn.Module, batch: Batch) -> Tensor:
        """[pairs, 2] float32: of the chosen and of the rejected answer."""
        logits: Tensor = model(**batch.inputs).logits
        return logits.float().squeeze(-1)[batch.positions]

    def _loss(self, scores: Tensor, batch: Batch) -> LossSum:
        from torch.nn.functional import logsigmoid

        losses = -logsigmoid(scores[:, 0] - scores[:, 1])
        losses = losses + self.config.center_rewards_coefficient * scores.sum(dim=1).square()
        return LossSum(losses.sum(), losses.new_tensor(batch.loss_weight), losses=losses)
