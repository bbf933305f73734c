"""Preference optimisation: the chosen answer becomes more probable than the rejected one (DPO and its kin).

With r = log p(answer) - log p_start(answer), p_start being the model as it starts, m = beta * (r_chosen - r_rejected)
and e = label_smoothing, the losses of a pair are, as in TRL:

| loss_type | loss | source |
| --- | --- | --- |
| sigmoid | -(1 - e) log sigmoid(m) - e log sigmoid(-m) | Rafailov et al. 2023, eq. 7; e > 0: Mitchell 2023 (cDPO) |
| robust | (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e) | Chowdhury et al. 2024, eq. 12 |
| hinge | max(0, 1 - m) | Zhao et al. 2023 (SLiC) |
| ipo | (r_chosen / tokens - r_rejected / tokens - 1 / (2 beta))² | Azar et al. 2023, eq. 17, over means of tokens |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.task import PreferenceConfig
from ..data.read.formats import IGNORED_LABEL
from ..data.store.pack import count_shifted
from ..state import (
    CAUSAL_LM,
    REFERENCE,
    Architecture,
    Batch,
    Example,
    Facts,
    Layout,
    LossSum,
    Metrics,
    Row,
    Sample,
    Task,
)
from .batches.pairs import cut_pair, encode_pair
from .language_model import check_supervised

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn


MEANS = (  # over pairs, under TRL's names
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Preference(Task):
    """The task `preference`: a sample is two sequences, the prompt with its chosen and with its rejected answer.

    Args:
        config: the task's keys.
        facts: of the data.
        padding_free: lay documents out one after another, for models whose attention keeps them apart.
    """

    uses_facts: ClassVar[bool] = False

    def __init__(self, config: PreferenceConfig, facts: Facts | None = None, *, padding_free: bool) -> None:
        self.config = config
        self.padding_free = padding_free

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture:
        """A causal language model with the head that it has."""
        return CAUSAL_LM

    @property
    def layout(self) -> Layout:
        """Two sequences a row that never see each other."""
        return Layout(
            {"max_length": self.config.max_length}, id_columns=("input_ids", "labels"), sequences=2, apart=True
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """See pairs.py.

        Raises:
            RowFault: nothing can be learned from it.
        """
        return [check_supervised(one) for one in encode_pair(row, tokenizer)]

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """The first `max_length` tokens of each.

        Raises:
            RowFault: nothing is left in which they differ.
        """
        return [check_supervised(one) for one in cut_pair(encode_pair(row, tokenizer), self.config.max_length)]

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """[samples]: tokens of both answers."""
        return count_shifted(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """A document for each answer, a pair's one after the other; the weight is the number of pairs."""
        import torch

        from .batches import tokens

        answers = [replace(sample, segments=[segment]) for sample in samples for segment in sample.segments]
        batch = (tokens.collate_documents if self.padding_free else tokens.collate_padded)(answers)
        known = [float(answer.segments[0][REFERENCE][0]) for answer in answers if REFERENCE in answer.segments[0]]
        reference = torch.tensor(known, dtype=torch.float64) if known else None
        return replace(batch, weight=float(len(samples)), reference=reference)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Sum of the pairs' losses, and their number."""
        return self._loss(self._log_probabilities(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """The loss with sums for `metrics`, and both rewards of each pair."""
        found = self._log_probabilities(model, batch)
        rewards = self.config.beta * self._ratios(found, batch)
        (chosen, rejected), logps = rewards.unbind(1), found.unbind(1)
        sums = (chosen, rejected, (chosen > rejected).double(), chosen - rejected, *logps)
        predictions = [
            {"sample": sample, "reward_chosen": one, "reward_rejected": other}
            for sample, (one, other) in zip(batch.samples[::2], rewards.tolist(), strict=True)
        ]
        counts = {name: values.sum() for name, values in zip(MEANS, sums, strict=True)}
        return replace(self._loss(found, batch), counts=counts, predictions=predictions)

    def refer(self, model: nn.Module, batch: Batch) -> LossSum:
        """Both log-probabilities of each pair, as predictions."""
        found = self._log_probabilities(model, batch)
        pairs = zip(batch.samples[::2], found.tolist(), strict=True)
        predictions = [{"sample": sample, "values": values} for sample, values in pairs]
        return LossSum(found.new_zeros(()), found.new_tensor(batch.loss_weight), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """loss and MEANS; before the first step every reward is 0, and no pair's answers are apart."""
        pairs = float(totals.weight)
        return {"loss": float(totals.loss) / pairs} | {name: float(totals.counts[name]) / pairs for name in MEANS}

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """[pairs, 2] float64: of the chosen and of the rejected answer."""
        from .batches import tokens

        return _in_pairs(tokens.sum_log_probabilities(model, batch))

    def _ratios(self, found: Tensor, batch: Batch) -> Tensor:
        """[pairs, 2]: log-probabilities less those of the model as it started."""
        assert batch.reference is not None, "reference.py measures it before the first loss"
        return found - _in_pairs(batch.reference)

    def _loss(self, found: Tensor, batch: Batch) -> LossSum:
        import torch
        from torch.nn.functional import logsigmoid

        kind, beta, share = self.config.loss_type, self.config.beta, self.config.label_smoothing
        ratios = self._ratios(found, batch)
        if kind == "ipo":
            means = ratios / _in_pairs(batch.documents.bincount(minlength=ratios.numel()))
            losses = (means[:, 0] - means[:, 1] - 1 / (2 * beta)).square()
        else:
            margins = beta * (ratios[:, 0] - ratios[:, 1])
            right, wrong = -logsigmoid(margins), -logsigmoid(-margins)
            if kind == "hinge":
                losses = (1 - margins).relu()
            elif kind == "robust":
                losses = ((1 - share) * right - share * wrong) / (1 - 2 * share)
            else:
                losses = (1 - share) * right + share * wrong
        chosen = torch.arange(0, 2 * len(losses), 2, device=losses.device)  # documents: a pair is told by its first
        return LossSum(losses.sum(), losses.new_tensor(batch.loss_weight), losses=losses, documents=chosen)


def _in_pairs(values: Tensor) -> Tensor:
    """[2 * pairs] as [pairs, 2]; a rank without samples has none."""
    return values.view(len(values) // 2, 2)
