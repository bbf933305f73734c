"""Cost of a step: time, throughput, memory, and model FLOPs utilization (MFU)."""

from __future__ import annotations

import resource
from collections.abc import Sequence

import torch

from ..state import Batch, Metrics, StepInfo
from .flops import StepCost, peak_flops


class Meter:
    """A hook that measures `perf/*`.

    Args:
        device: Device of this rank.
        world_size: Number of ranks, by which the peak of the device is multiplied.
        cost: FLOP count of the model.
    """

    def __init__(self, device: torch.device, world_size: int, cost: StepCost) -> None:
        self.device = device
        self.cost = cost
        peak = peak_flops(device)
        self.peak = None if peak is None else peak * world_size

    def before_step(self, micros: Sequence[Batch]) -> None:
        """Do nothing; the loop measures the time."""

    def after_step(self, info: StepInfo) -> Metrics:
        """Return throughput, step time, wait for data, peak memory and, if the device's peak is known, MFU."""
        metrics = {
            "perf/tokens_per_second": info.tokens / info.step_time_s,
            "perf/step_time_s": info.step_time_s,
            "perf/data_wait_share": info.load_time_s / info.step_time_s,
            "perf/peak_memory_bytes": float(peak_memory_bytes(self.device)),
        }
        if self.peak is not None:
            metrics["perf/mfu"] = self.cost.of(info.tokens, info.squared_lengths) / info.step_time_s / self.peak
        return metrics


def peak_memory_bytes(device: torch.device) -> int:
    """Return the peak memory of this rank in bytes: on its GPU, or of its process on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
