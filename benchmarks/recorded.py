"""A run of this package in the benchmark's own process, with the metrics of every step."""

from __future__ import annotations

import resource
import sys
from dataclasses import replace
from typing import Any


def cpu_seconds() -> float:
    """CPU time of this process, user and system."""
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Recorder:
    """A tracker that keeps the metrics of training steps in `steps`, each with the CPU seconds spent so far."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def log(self, metrics: Any, *, step: int) -> None:
        if "train/loss" in metrics:
            self.steps.append({**metrics, "cpu_s": cpu_seconds()})

    def close(self) -> None:
        pass


def train(config: Any) -> list[dict[str, float]]:
    """Train alone, without saving or exporting, and return the metrics of each step."""
    from dist_ft.build import build
    from dist_ft.config.plan import make_plan
    from dist_ft.loop import fit
    from dist_ft.prepare import prepare
    from dist_ft.process import comm
    from dist_ft.process.place import Place, Worker, find_device

    place, plan = Place(), make_plan(config, nodes=1, workers_per_node=1, origins={})
    device = find_device(place)
    comm.join(place, comm.open_store(place, 60), device, 60)
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    run = build(plan, prepare(config), Worker(place, device, sys.stderr, lambda phase: None))
    recorder = Recorder()
    run.records = replace(run.records, tracker=recorder, save=lambda progress: None)
    fit(run)
    return recorder.steps
