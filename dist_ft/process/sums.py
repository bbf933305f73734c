"""Sums of losses and counts over micro-batches and ranks; a quotient is taken last."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import LossSum, Metrics, Prediction
from . import comm

OF = "@"  # in a name: what is before it, of the set behind it (see parts.py)


class Sums:
    """Adds up what micro-batches give, in float64 on the CPU."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.predictions: list[Prediction] = []

    def add(self, result: LossSum) -> None:
        """Add a micro-batch."""
        self.predictions.extend(result.predictions)
        for name, value in flatten(result).items():
            self.sums[name] = self.sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()

    def total(self) -> LossSum:
        """The sums over all ranks, which all must ask for; predictions are not among them."""
        names = sorted(self.sums)
        found = dict(zip(names, comm.total(torch.stack([self.sums[name] for name in names])), strict=True))
        return LossSum(found.pop("loss"), found.pop("weight"), found)


def losses_of_parts(totals: LossSum) -> Metrics:
    """`loss/NAME` of each set of which something was learned."""
    weights = {key.partition(OF)[2]: value for key, value in totals.counts.items() if key.startswith(f"weight{OF}")}
    return {
        f"loss/{name}": float(totals.counts[f"loss{OF}{name}"] / weight) for name, weight in weights.items() if weight
    }


def flatten(result: LossSum) -> dict[str, Tensor]:
    """Every sum by its name."""
    return {"loss": result.loss, "weight": result.weight, **result.counts}
