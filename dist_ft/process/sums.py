"""Sums of losses and counts over micro-batches and ranks; quotients are computed from the final sums."""

from __future__ import annotations

import torch
from torch import Tensor

from ..state import LossSum, Metrics, Prediction
from . import comm

OF = "@"  # in NAME@SET, separates the name of a sum from that of its data set (see task/by_set.py)


class Sums:
    """Accumulator of the results of micro-batches, in float64 on their device, where nothing waits for them."""

    def __init__(self) -> None:
        self.sums: dict[str, Tensor] = {}
        self.predictions: list[Prediction] = []

    def add(self, result: LossSum) -> None:
        """Add the result of a micro-batch."""
        self.predictions.extend(result.predictions)
        for name, value in flatten(result).items():
            added = value.detach().double()
            self.sums[name] = self.sums[name] + added if name in self.sums else added

    def total(self) -> LossSum:
        """Return the sums over all ranks on the CPU, without predictions; every rank must call this."""
        names = sorted(self.sums)
        found = dict(zip(names, comm.total(self._read(names)), strict=True))
        return LossSum(found.pop("loss"), found.pop("weight"), found)

    def _read(self, names: list[str]) -> Tensor:
        """Copy the sums to the CPU, with one copy for each device that they are on."""
        devices = {self.sums[name].device for name in names}
        read = {
            name: value
            for device in devices
            for own in [[name for name in names if self.sums[name].device == device]]
            for name, value in zip(own, torch.stack([self.sums[name] for name in own]).cpu(), strict=True)
        }
        return torch.stack([read[name] for name in names])


def losses_of_parts(totals: LossSum) -> Metrics:
    """Return `loss/NAME` for each data set with a nonzero weight."""
    weights = {key.partition(OF)[2]: value for key, value in totals.counts.items() if key.startswith(f"weight{OF}")}
    return {
        f"loss/{name}": float(totals.counts[f"loss{OF}{name}"] / weight) for name, weight in weights.items() if weight
    }


def flatten(result: LossSum) -> dict[str, Tensor]:
    """Return loss, weight and counts by name."""
    return {"loss": result.loss, "weight": result.weight, **result.counts}
