"""Preference optimization: direct preference optimization (DPO) and its variants.

With r = log p(answer) - log p_ref(answer), where p_ref is the reference model (the model before training),
m = beta * (r_chosen - r_rejected) and e = label_smoothing, the losses of a pair are, as in TRL:

| loss_type | loss | source |
| --- | --- | --- |
| sigmoid | -(1 - e) log sigmoid(m) - e log sigmoid(-m) | Rafailov et al. 2023, eq. 7; e > 0: Mitchell 2023 (cDPO) |
| robust | (-(1 - e) log sigmoid(m) + e log sigmoid(-m)) / (1 - 2 e) | Chowdhury et al. 2024, eq. 12 |
| hinge | max(0, 1 - m) | Zhao et al. 2023 (SLiC) |
| ipo | (r_chosen / tokens - r_rejected / tokens - 1 / (2 beta))² | Azar et al. 2023, eq. 17, with means over tokens |
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, ClassVar

from ..config.task import PreferenceConfig
from ..data.read.formats import IGNORED_LABEL
from ..data.store.pack import count_shifted
from ..protocols import Task
from ..state import CAUSAL_LM, REFERENCE, Architecture, Batch, Example, Facts, Layout, LossSum, Metrics, Row, Sample
from .batches.pairs import cut_pair, encode_pair
from .language_model import check_supervised

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from ..model.head import OutputHead


MEANS = (  # means over pairs, with the metric names of TRL
    "rewards/chosen",
    "rewards/rejected",
    "rewards/accuracies",
    "rewards/margins",
    "logps/chosen",
    "logps/rejected",
)


class Preference(Task):
    """The task `preference`, whose samples are two sequences: the prompt with the chosen and with the rejected answer.

    Args:
        config: Task configuration.
        facts: Not used.
        padding_free: Whether to concatenate documents without padding; requires a model whose attention separates them.
    """

    head: OutputHead | None = None  # computes losses in chunks if set
    uses_facts: ClassVar[bool] = False

    def __init__(self, config: PreferenceConfig, facts: Facts | None = None, *, padding_free: bool) -> None:
        self.config = config
        self.padding_free = padding_free

    @staticmethod
    def architecture(config: Any, facts: Facts) -> Architecture:
        """Return the architecture: a causal language model with its pretrained head."""
        return CAUSAL_LM

    @property
    def layout(self) -> Layout:
        """Two sequences per row, which do not attend to each other."""
        return Layout(
            {"max_length": self.config.max_length}, id_columns=("input_ids", "labels"), sequences=2, apart=True
        )

    def encode(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a pair; see `encode_pair`.

        Raises:
            RowFault: If an answer is empty or has no supervised token, or if both answers are the same.
        """
        return [check_supervised(one) for one in encode_pair(row, tokenizer)]

    def truncate(self, row: Row, tokenizer: Any) -> Sequence[Example]:
        """Tokenize a pair and truncate both sequences to their first `max_length` tokens.

        Raises:
            RowFault: If the truncated sequences are identical, or one of them has no supervised token.
        """
        return [check_supervised(one) for one in cut_pair(encode_pair(row, tokenizer), self.config.max_length)]

    def count_targets(self, table: Any, samples: Any) -> np.ndarray:
        """Return the number of supervised tokens of both answers of each sample, `[samples]` int64."""
        return count_shifted(table, samples, IGNORED_LABEL)

    def collate(self, samples: Sequence[Sample]) -> Batch:
        """Collate pairs, each as its chosen and then its rejected sequence; the weight is the number of pairs."""
        import torch

        from .batches import tokens

        answers = [replace(sample, segments=[segment]) for sample in samples for segment in sample.segments]
        batch = (tokens.collate_documents if self.padding_free else tokens.collate_padded)(answers)
        known = [float(answer.segments[0][REFERENCE][0]) for answer in answers if REFERENCE in answer.segments[0]]
        reference = torch.tensor(known, dtype=torch.float64) if known else None
        return replace(batch, weight=float(len(samples)), reference=reference)

    def loss(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the sum of the losses of the pairs, and the number of pairs."""
        return self._loss(self._log_probabilities(model, batch), batch)

    def score(self, model: nn.Module, batch: Batch) -> LossSum:
        """Compute the loss, the sums that `metrics` needs, and the rewards of both answers of each pair."""
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
        """Compute the log-probabilities of both answers of each pair, returned as predictions."""
        found = self._log_probabilities(model, batch)
        pairs = zip(batch.samples[::2], found.tolist(), strict=True)
        predictions = [{"sample": sample, "values": values} for sample, values in pairs]
        return LossSum(found.new_zeros(()), found.new_full((), batch.loss_weight), predictions=predictions)

    def metrics(self, totals: LossSum, rows: Sequence[Row]) -> Metrics:
        """Compute `loss` and the metrics in `MEANS`; before the first step, rewards, margins and accuracies are 0."""
        pairs = float(totals.weight)
        return {"loss": float(totals.loss) / pairs} | {name: float(totals.counts[name]) / pairs for name in MEANS}

    def _log_probabilities(self, model: nn.Module, batch: Batch) -> Tensor:
        """Return the log-probabilities of the chosen and the rejected answers, `[pairs, 2]` float64."""
        from .batches import tokens

        return _in_pairs(tokens.sum_log_probabilities(model, batch, self.head))

    def _ratios(self, found: Tensor, batch: Batch) -> Tensor:
        """Return the log-probabilities minus those of the reference model, `[pairs, 2]` float64."""
        assert batch.reference is not None, "reference log-probabilities are computed before training"
        return found - _in_pairs(batch.reference)

    def _loss(self, found: Tensor, batch: Batch) -> LossSum:
        import torch
        from torch.nn.functional import logsigmoid

        kind, beta, share = self.config.loss_type, self.config.beta, self.config.label_smoothing
        ratios = self._ratios(found, batch)
        if kind == "ipo":
            counts = batch.documents.new_zeros(ratios.numel())  # a bincount would wait for the device
            means = ratios / _in_pairs(counts.index_add(0, batch.documents, torch.ones_like(batch.documents)))
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
        chosen = torch.arange(0, 2 * len(losses), 2, device=losses.device)  # a loss is assigned to its chosen document
        return LossSum(losses.sum(), losses.new_full((), batch.loss_weight), losses=losses, documents=chosen)


def _in_pairs(values: Tensor) -> Tensor:
    """Reshape `[2 * pairs]` to `[pairs, 2]`, also without any pairs."""
    return values.view(len(values) // 2, 2)
