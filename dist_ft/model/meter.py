"""What a step cost: time, tokens, memory, and how much of the device's arithmetic it used."""

from __future__ import annotations

import resource
from collections.abc import Callable

import torch

from ..state import Metrics
from .flops import StepCost, peak_flops


def meter(device: torch.device, world_size: int, cost: StepCost | None) -> Callable[[float, int, int], Metrics]:
    """The function behind `perf/*`: (step time in s, tokens, squared document lengths, of all ranks) → metrics."""
    peak = peak_flops(device)

    def measure(step_time_s: float, tokens: int, squared_lengths: int) -> Metrics:
        metrics = {
            "perf/tokens_per_second": tokens / step_time_s,
            "perf/step_time_s": step_time_s,
            "perf/peak_memory_bytes": float(peak_memory_bytes(device)),
        }
        if peak is not None and cost is not None:
            metrics["perf/mfu"] = cost.of(tokens, squared_lengths) / step_time_s / (peak * world_size)
        return metrics

    return measure


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has held: on its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
