"""The loop: what happens in a run, in the order it happens. It knows protocols, and never which engine it drives."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from .config.train import TrainConfig
from .errors import TrainingError
from .process import comm
from .process.sums import Sums, losses_of_parts
from .state import (
    LOWER_IS_BETTER,
    Batch,
    Engine,
    Hook,
    LossFn,
    LossSum,
    Metrics,
    Progress,
    Row,
    StepInfo,
    Task,
    Tracker,
)


@dataclass
class Run:
    """Everything that a run needs, built by build.py."""

    config: TrainConfig
    task: Task
    engine: Engine
    tracker: Tracker
    hooks: list[Hook]
    total_steps: int
    progress: Progress  # where the run stands; a resumed one begins there
    rank: int
    micro_batches: Callable[[int], list[Batch]]  # of this rank, for a step
    validation: Callable[[], Iterator[Batch]] | None
    validation_rows: Sequence[Row]  # as they were, where the task's metrics need them
    learning_rate: Callable[[int], float]
    epoch_at: Callable[[int], float]
    save: Callable[[Progress], None]
    restore: Callable[[str], None]  # the weights of a checkpoint, by its name
    beat: Callable[[str], None]  # tells the watchdog how far this rank has come
    measure: Callable[[float, int, int], Metrics]  # step time in s, tokens, squared lengths of all ranks → perf/*
    export: Callable[[], None]
    may_be_empty: bool = False  # whether a step may happen to have no rows


def fit(run: Run) -> Progress:
    """Train from `run.progress` to the last step, or to where patience ends; return where the run then stands."""
    if run.progress.step == 0 and run.validation:
        assess(run, 0, counts=not run.config.load_best_model_at_end)
    while run.progress.step < run.total_steps and not out_of_patience(run):
        step = run.progress.step + 1
        metrics = train_step(run, step)
        run.progress = replace(run.progress, step=step)
        last = step == run.total_steps
        if last or step % run.config.logging_steps == 0:
            run.tracker.log(metrics, step=step)
        if run.validation and (last or due(step, run.config.eval_steps)):
            assess(run, step)
        is_best = run.progress.best_step == step and step > 0
        if last or due(step, run.config.save_steps) or (is_best and keeps_best(run.config)) or out_of_patience(run):
            run.beat(f"checkpoint of step {step}")
            run.save(run.progress)
        for hook in run.hooks:
            hook.on_step(StepInfo(step, run.total_steps, metrics))
    if run.config.load_best_model_at_end and run.progress.best_step != run.progress.step:
        run.restore(f"step-{run.progress.best_step}")
        assess(run, run.progress.step, counts=False)  # what is exported is what the last line tells of
    return run.progress


def train_step(run: Run, step: int) -> Metrics:
    """One optimizer step over the global batch: the sum of its losses over their weight, the number of its targets."""
    started = time.perf_counter()
    micros = run.micro_batches(step)
    own = [(m.loss_weight, m.supervised, m.tokens, m.squared_lengths) for m in micros]
    weight, supervised, tokens, squared_lengths = comm.total(torch.tensor(own, dtype=torch.float64).sum(dim=0))
    if supervised == 0 and not run.may_be_empty:
        raise TrainingError.of(f"step {step}", "has no supervised token", "see `dist-ft data` for what is supervised")
    # Dropout is a function of seed, step and rank, so that a resumed run draws what an uninterrupted one draws.
    torch.manual_seed((run.config.seed * 1_000_003 + step) * 65_537 + run.rank)
    sums = Sums()
    for i, micro in enumerate(micros, start=1):
        run.beat(f"step {step}, micro-batch {i} of {len(micros)}")
        sums.add(run.engine.forward_backward(micro, run.task.loss, weight, last=i == len(micros)))
    rate = run.learning_rate(step)
    stats = run.engine.step(rate)
    totals = sums.total()
    mean = float(totals.loss / weight) if supervised else 0.0
    if not (math.isfinite(mean) and math.isfinite(stats.grad_norm)):
        rule = f"loss is {mean}, gradient norm {stats.grad_norm}"
        raise TrainingError.of(f"step {step}", rule, "lower optim.learning_rate, or look at this step's rows")
    return {
        "epoch": run.epoch_at(step),
        "train/loss": mean,
        **{f"train/{name}": value for name, value in losses_of_parts(totals).items()},
        "train/grad_norm": stats.grad_norm,
        "train/learning_rate": rate,
        "train/supervised_tokens": int(supervised),
        **stats.metrics,
        **run.measure(time.perf_counter() - started, int(tokens), int(squared_lengths)),
    }


def assess(run: Run, step: int, *, counts: bool = True) -> None:
    """Evaluate and log; where it `counts`, remember which step was the best."""
    assert run.validation
    run.beat(f"evaluation at step {step}")
    totals = evaluate(run.engine, run.validation(), run.task.score, run.beat)
    found = run.task.metrics(totals, run.validation_rows) if run.rank == 0 else {}
    metrics = {f"eval/{name}": value for name, value in comm.from_main(found).items()}
    run.tracker.log(metrics, step=step)
    score = score_of(metrics, run.config.metric_for_best_model)
    if not counts:
        return
    if is_better(score, run.progress.best_score, run.config.metric_for_best_model):
        run.progress = replace(run.progress, best_score=score, best_step=step, stale_evaluations=0)
    else:
        run.progress = replace(run.progress, stale_evaluations=run.progress.stale_evaluations + 1)


def score_of(metrics: Metrics, name: str) -> float:
    """What `train.metric_for_best_model` names.

    Raises:
        TrainingError: this task has no such metric.
    """
    if f"eval/{name}" not in metrics:
        known = ", ".join(key.removeprefix("eval/") for key in metrics)
        raise TrainingError.of("train.metric_for_best_model", f"there is no eval/{name}", f"name one of {known}")
    return metrics[f"eval/{name}"]


def is_better(score: float, best: float | None, name: str) -> bool:
    """Whether a score of this name is the best so far; losses, errors and perplexities are better when lower."""
    return best is None or (score < best if name.partition("/")[0] in LOWER_IS_BETTER else score > best)


def evaluate(engine: Engine, batches: Iterator[Batch], score: LossFn, beat: Callable[[str], None]) -> LossSum:
    """Sums over all rows and ranks: the same numbers on any world size and batch size."""
    sums = Sums()
    for i, batch in enumerate(batches, start=1):
        beat(f"evaluation, micro-batch {i}")
        sums.add(engine.evaluate(batch, score))
    everyone = [prediction for part in comm.gather(sums.predictions) for prediction in part]
    everyone.sort(key=lambda prediction: prediction["sample"])
    return replace(sums.total(), predictions=everyone)


def due(step: int, every: int | None) -> bool:
    """Whether something that happens `every` so many steps happens at `step`."""
    return every is not None and step % every == 0


def keeps_best(config: TrainConfig) -> bool:
    """Whether a checkpoint is written where the evaluation is the best so far."""
    return bool(config.save_steps or config.early_stopping_patience or config.load_best_model_at_end)


def out_of_patience(run: Run) -> bool:
    """Whether there was nothing better for as many evaluations as the run waits."""
    patience = run.config.early_stopping_patience
    return patience is not None and run.progress.stale_evaluations >= patience
