"""How long each rank takes for its own part of a step: a slow rank, or slow data, is named once.

All ranks take the same time for a step, because they wait for each other, so only work without a collective tells them
apart: collating the micro-batches, and forward passes. Under engines that gather weights in a forward pass (fsdp,
zero3), forward passes include waiting, and a rank that is slow in them may not be found.
"""

from __future__ import annotations

import statistics
import time
from collections import deque
from collections.abc import Sequence

import torch

from ..process import comm
from ..process.place import Worker
from ..protocols import LossFn
from ..state import Batch, LossSum, Metrics, StepInfo

WINDOW = 20  # steps, of which medians are compared
SLOW = 1.5  # times the median of the other ranks
LEAST = 0.05  # of the time of a step, below which a difference does not matter
MUCH = 0.25  # of the time of a step, above which loading is slow
PARTS = ("loading data", "its forward passes")


class Pace:
    """A hook that measures the parts of a step of this rank, and compares them with those of other ranks.

    What the ranks have measured is exchanged while they work, once in `WINDOW` steps. Collective.
    """

    def __init__(self, worker: Worker) -> None:
        self.worker = worker
        self.hosts: list[str] = comm.gather(worker.place.host)
        self._clock = _Clock(worker.device)
        self._own: deque[tuple[float, ...]] = deque(maxlen=WINDOW)
        self._exchange = comm.Exchange()
        self._metrics: Metrics = {}
        self._told: set[tuple[int, int]] = set()

    def timed(self, loss: LossFn) -> LossFn:
        """Return `loss`, whose calls are forward passes, so that they are measured."""

        def measured(model: torch.nn.Module, batch: Batch) -> LossSum:
            self._clock.start()
            found = loss(model, batch)
            self._clock.stop()
            return found

        return measured

    def before_step(self, micros: Sequence[Batch]) -> None:
        """Do nothing; the loop measures loading."""

    def after_step(self, info: StepInfo) -> Metrics:
        """Return what is known of all ranks: the longest median time of loading, and the ratio of the slowest rank."""
        self._own.append((info.load_time_s, self._clock.take(), info.step_time_s))
        if (everyone := self._exchange.take()) is not None:
            self._judge(everyone, info.step - 1)
        if info.step % WINDOW == 0:
            self._exchange.post([statistics.median(part) for part in zip(*self._own, strict=True)])
        return self._metrics

    def _judge(self, everyone: list[list[float]], step: int) -> None:
        loads, forwards, steps = zip(*everyone, strict=True)
        step_time_s = statistics.median(steps)
        ratios = [ratio for ratio, _ in compare([sum(row[:2]) for row in everyone])]
        self._metrics = {"perf/load_time_s": max(loads), "perf/slowest_rank_ratio": max(ratios, default=1.0)}
        for number, times in enumerate((loads, forwards)):
            for rank in find_slow(times, LEAST * step_time_s):
                _, others = compare(times)[rank]
                what = f"{PARTS[number]} took {times[rank]:.3g} s a step, and {others:.3g} s on other ranks"
                self._tell(number, rank, step, f"is slow: {what}, which wait for it")
        slowest = max(range(len(loads)), key=loads.__getitem__)
        if loads[slowest] > MUCH * step_time_s:
            rule = f"waits for its data: loading took {loads[slowest]:.3g} s of {step_time_s:.3g} s a step"
            self._tell(len(PARTS), slowest, step, rule)

    def _tell(self, number: int, rank: int, step: int, rule: str) -> None:
        if (number, rank) not in self._told:
            self._told.add((number, rank))
            line = f"rank {rank} on {self.hosts[rank]} {rule} (medians of {WINDOW} steps up to step {step})"
            print(line, flush=True)  # to the log of each rank
            self.worker.say(line)


def compare(times: Sequence[float]) -> list[tuple[float, float]]:
    """Return for each rank the ratio of its time to the median of the others', and that median; 1 for a single rank."""
    if len(times) == 1:
        return [(1.0, times[0])]
    found = []
    for rank, own in enumerate(times):
        others = statistics.median([*times[:rank], *times[rank + 1 :]])
        found.append((own / others if others > 0 else 1.0, others))
    return found


def find_slow(times: Sequence[float], least_s: float) -> list[int]:
    """Return the ranks that take `SLOW` times as long as the median of the others, and at least `least_s` longer."""
    slow = enumerate(compare(times))
    return [rank for rank, (ratio, others) in slow if ratio > SLOW and times[rank] - others > least_s]


class _Clock:
    """Measures passes on a device, on a GPU without waiting for it."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._begun = 0.0
        self._passed_s = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    def start(self) -> None:
        if self._on_gpu:
            pair = (torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True))
            pair[0].record()
            self._events.append(pair)
        else:
            self._begun = time.perf_counter()

    def stop(self) -> None:
        if self._on_gpu:
            self._events[-1][1].record()
        else:
            self._passed_s += time.perf_counter() - self._begun

    def take(self) -> float:
        """Return the seconds measured since the last call; a step has ended, so the GPU has recorded all events."""
        passed_s = self._passed_s + sum(first.elapsed_time(last) for first, last in self._events) / 1000
        self._passed_s, self._events = 0.0, []
        return passed_s
