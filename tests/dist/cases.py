"""What worker groups of the tests run: whole runs in an already joined group, one after another."""

from __future__ import annotations

import contextlib
import gc
import json
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from dist_ft.build import build
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.errors import Stopped, TrainingError
from dist_ft.loop import Run, fit
from dist_ft.prepare import prepare
from dist_ft.process import comm
from dist_ft.process.place import Place, Worker
from dist_ft.state import Batch, LossSum, Progress, Weights


def run_case(place: Place, case: dict[str, Any]) -> dict[str, Any]:
    """Train as `case["config"]` says; `stop_after` ends early, as if the run had been stopped there.

    `export` writes the trained model too, as a worker does at the end. `ask` asks a rank to stop, see `ask_at`.
    """
    config = RunConfig.model_validate(case["config"])
    plan = make_plan(config, nodes=1, workers_per_node=place.world_size, origins={})
    if place.is_main:
        write_plan(plan)
    prepared = prepare(config)
    comm.barrier()
    torch.manual_seed(1234 + place.rank)  # ranks that start from their own random state must not matter
    run = build(plan, prepared, Worker(place, torch.device("cpu"), sys.stderr, lambda phase: None))
    if case.get("ask"):
        ask_at(run, **case["ask"])
    if case.get("poison"):
        poison(run, **case["poison"])
    if case.get("stop_after"):
        # the schedule still aims at the configured end
        run.training = replace(run.training, total_steps=case["stop_after"])
    with contextlib.closing(run.records.tracker):
        try:
            progress = fit(run)
        except Stopped as error:
            return {"step": run.progress.step, "stopped": str(error)}
        except TrainingError as error:
            return {"step": run.progress.step, "failed": str(error)}
        assert progress.step == case.get("stop_after", progress.step), progress
        if case.get("export"):
            run.records.export()
    keep_weights(place, run.training.engine.weights(trainable=True), plan.run_dir / "weights.pt")
    keep_weights(place, run.training.engine.weights(trainable=False), plan.run_dir / "all_weights.pt")
    comm.barrier()
    return {"step": progress.step, "engine": type(run.training.engine).__name__}


def ask_at(run: Run, rank: int, phase: str, step: int, micro: int = 0) -> None:
    """Ask `rank` to stop once it is in a `phase` (step, evaluation or save) of `step`, in micro-batch `micro`."""
    training, validation, records = run.training, run.validation, run.records

    def ask(at: int) -> None:
        if run.rank == rank and at == step:
            run.stop.ask("SIGTERM")

    def forward_backward(batch: Batch, *arguments: Any, last: bool) -> LossSum:
        ask(run.progress.step + 1)
        return own(batch, *arguments, last=last)

    def batches() -> Iterator[Batch]:
        for i, batch in enumerate(validation.batches()):
            if i == micro:
                ask(run.progress.step)
            yield batch

    def save(progress: Progress) -> None:
        ask(progress.step)
        records.save(progress)

    if phase == "step":
        own, training.engine.forward_backward = training.engine.forward_backward, forward_backward
    elif phase == "evaluation":
        run.validation = replace(validation, batches=batches)
    else:
        run.records = replace(records, save=save)


def poison(run: Run, rank: int, steps: list[int], value: float) -> None:
    """Multiply the loss of one micro-batch of `rank` by `value` (NaN or infinity) in these steps."""
    own = run.training.engine.forward_backward

    def forward_backward(batch: Batch, loss: Any, *arguments: Any, last: bool) -> LossSum:
        def poisoned(model: Any, given: Batch) -> LossSum:
            found = loss(model, given)
            return replace(found, loss=found.loss * value)

        hit = last and run.rank == rank and run.progress.step + 1 in steps
        return own(batch, poisoned if hit else loss, *arguments, last=last)

    run.training.engine.forward_backward = forward_backward  # type: ignore[method-assign]


def keep_weights(place: Place, weights: Weights, path: Path) -> None:
    """Rank 0 writes what every rank takes part in giving."""
    kept = {name: tensor.detach().clone().cpu() for name, tensor in weights}
    if place.is_main:
        torch.save(kept, path)


def run_cases(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case in turn."""
    found = []
    for case in cases:
        found.append(run_case(place, case))
        if len(found) == 1:  # DeepSpeed collects garbage at each start, which takes a second over all that is imported
            gc.collect()
            gc.freeze()
    return found


def metrics_of(run_dir: Path) -> list[dict[str, float]]:
    """The training lines of metrics.jsonl."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "train/loss" in line]


def buffers_after_setup(place: Place, configs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The dtypes and sums of the model's buffers once the engine holds it, for each configuration."""
    found = []
    for given in configs:
        config = RunConfig.model_validate(given)
        plan = make_plan(config, nodes=1, workers_per_node=place.world_size, origins={})
        write_plan(plan)
        run = build(plan, prepare(config), Worker(place, torch.device("cpu"), sys.stderr, lambda phase: None))
        model: Any = run.training.engine.model  # type: ignore[attr-defined]
        found.append({name: [str(b.dtype), float(b.double().sum())] for name, b in model.named_buffers()})
    return found
