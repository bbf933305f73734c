"""The training loop, which depends only on protocols and not on a particular task, method or engine."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import NoReturn

import torch
from torch import nn

from .config.train import EPOCH_SAVE_MINUTES, TrainConfig
from .errors import DistFtError, TrainingError
from .process import comm
from .process.stop import BEFORE, Stop
from .process.sums import Sums, losses_of_parts
from .protocols import Engine, Hook, LossFn, Task, Tracker
from .state import LOWER_IS_BETTER, Batch, Beat, LossSum, Metrics, Progress, Row, StepInfo, unwatched

MOST_SKIPPED = 10  # steps in a row; more of them mean that the weights themselves are bad


@dataclass(frozen=True)
class Training:
    """The parts of a run that train."""

    task: Task
    engine: Engine
    batches: Callable[[int], list[Batch]]  # the micro-batches of this rank for a step
    learning_rate: Callable[[int], float]
    epoch_at: Callable[[int], float]
    total_steps: int
    hooks: Sequence[Hook]
    timed: Callable[[LossFn], LossFn] = lambda loss: loss  # measures the calls of the loss
    may_be_empty: bool = False  # whether a step may have no rows (Poisson sampling)


@dataclass(frozen=True)
class Validation:
    """The parts of a run that evaluate on the validation split."""

    task: Task
    batches: Callable[[], Iterator[Batch]]
    rows: Sequence[Row]  # the columns that metrics need unchanged; on rank 0 only


@dataclass(frozen=True)
class Records:
    """The parts of a run that write metrics, checkpoints and the exported model."""

    tracker: Tracker
    save: Callable[[Progress], None]  # may go on in the background
    restore: Callable[[str], None]  # loads the weights of a checkpoint, by its name
    export: Callable[[], None]
    settle: Callable[[], None] = lambda: None  # waits until the last save is complete
    failure: Callable[[], DistFtError | None] = lambda: None  # error of this rank's save in the background


@dataclass(slots=True)
class Run:
    """Everything that a run needs, built by build.py; a resumed run starts at `progress`."""

    config: TrainConfig
    rank: int
    training: Training
    validation: Validation | None
    records: Records
    beat: Beat
    progress: Progress
    tick: Beat = unwatched
    stop: Stop = field(default_factory=Stop)
    saved_at: float = field(default_factory=time.monotonic)
    saved_step: int = 0
    skipped: int = 0  # steps in a row whose update was skipped, see `train.on_nonfinite`
    since_save_s: float = 0.0  # seconds from the last save to this step, by rank 0's clock


class StopAgreed(Exception):
    """All ranks have agreed to stop here, because one of them was asked to."""


def fit(run: Run) -> Progress:
    """Train from `run.progress` to the last step or until early stopping, and return the final progress.

    Raises:
        Stopped: A rank was asked to stop; a checkpoint was saved.
    """
    if run.progress.step == 0:
        assess(run, 0, counts=not run.config.load_best_model_at_end)
    run.saved_step = run.progress.step if run.config.resume == "auto" else 0  # a given path may be in another folder
    run.stop.hold(run.config.resume)
    try:
        if run.progress.evaluation_pending:
            conclude(run)
        while run.progress.step < run.training.total_steps and not out_of_patience(run):
            step = run.progress.step + 1
            metrics = train_step(run, step)
            run.progress = replace(run.progress, step=step)
            if step == run.training.total_steps or step % run.config.logging_steps == 0:
                run.records.tracker.log(metrics, step=step)
            conclude(run)
    except StopAgreed:
        halt(run)
    settle(run)
    run.stop.rest(f"training is complete and step {run.progress.step} is saved, but the model was not exported")
    run.stop.leave()
    if run.config.load_best_model_at_end and run.progress.best_step not in (None, run.progress.step):
        run.records.restore(f"step-{run.progress.best_step}")
        assess(run, run.progress.step, counts=False)  # the last logged metrics are those of the exported model
    return run.progress


def conclude(run: Run) -> None:
    """Evaluate and save after a step, where they are due."""
    config, step = run.config, run.progress.step
    last = step == run.training.total_steps
    if last or due(step, config.eval_steps) or run.progress.evaluation_pending:
        assess(run, step, may_stop=True)
    is_best = run.progress.best_step == step
    ends_epoch = math.floor(run.training.epoch_at(step)) > math.floor(run.training.epoch_at(step - 1))
    run.progress = replace(run.progress, complete=last or out_of_patience(run))
    if (
        run.progress.complete
        or due(step, config.save_steps)
        or has_passed(run, config.minutes_between_saves)
        or (ends_epoch and config.saves_each_epoch and has_passed(run, EPOCH_SAVE_MINUTES))
        or (is_best and keeps_best(config))
    ):
        save(run)


def save(run: Run) -> None:
    """Save a checkpoint of where the run stands."""
    run.beat(f"checkpoint of step {run.progress.step}")
    run.records.save(run.progress)
    run.saved_step, run.saved_at = run.progress.step, time.monotonic()


def settle(run: Run) -> None:
    """Wait until the last checkpoint is complete."""
    run.beat(f"checkpoint of step {run.saved_step}")
    run.records.settle()


def halt(run: Run) -> NoReturn:
    """Save where the run stands, unless that is saved, and end the run."""
    step, rule = run.progress.step, BEFORE
    cause = next(filter(None, comm.gather(run.stop.cause)))
    if step and run.saved_step != step:
        save(run)
    settle(run)
    if step:
        rule = f"step {step} of {run.training.total_steps} is saved in a checkpoint"
    run.stop.rest(rule)
    raise run.stop.stopped(rule, cause)


def train_step(run: Run, step: int) -> Metrics:
    """Take one optimizer step over the global batch: the sum of its losses divided by their weight.

    The reduction of the counts also carries whether a rank was asked to stop, the time since the last save (only rank
    0 looks at the clock), and whether a rank failed to write its part of a checkpoint.

    Raises:
        StopAgreed: A rank was asked to stop before this step.
        DistFtError: A rank failed to write a checkpoint.
    """
    training, started = run.training, time.perf_counter()
    micros = training.batches(step)
    load_time_s = time.perf_counter() - started
    for hook in training.hooks:
        hook.before_step(micros)
    own = [(m.loss_weight, m.supervised, m.tokens, m.squared_lengths) for m in micros]
    counts = torch.tensor(own, dtype=torch.float64).sum(dim=0)
    waited_s = time.monotonic() - run.saved_at if run.rank == 0 else 0.0
    asked = torch.tensor([run.stop.cause is not None, waited_s, run.records.failure() is not None], dtype=torch.float64)
    weight, supervised, tokens, squared_lengths, stop, since_save_s, failures = comm.total(torch.cat([counts, asked]))
    if failures:
        settle(run)  # raises the error on every rank
    if stop:
        raise StopAgreed
    run.since_save_s = float(since_save_s)
    if supervised == 0 and not training.may_be_empty:
        raise TrainingError.of(f"step {step}", "has no supervised token", "see `dist-ft data` for what is supervised")
    torch.manual_seed(step_seed(run.config.seed, step, run.rank))
    sums, loss = Sums(), training.timed(training.task.loss)
    for i, micro in enumerate(micros, start=1):
        run.beat(f"step {step}, micro-batch {i} of {len(micros)}")
        sums.add(training.engine.forward_backward(micro, loss, weight, last=i == len(micros)))
    rate = training.learning_rate(step)
    stats, totals = training.engine.step(rate), sums.total()
    mean = float(totals.loss / weight) if supervised else 0.0
    skips = judge(run, step, mean, stats.grad_norm)
    metrics: dict[str, float] = {
        "epoch": training.epoch_at(step),
        "train/loss": mean,
        **{f"train/{name}": value for name, value in losses_of_parts(totals).items()},
        "train/grad_norm": stats.grad_norm,
        "train/learning_rate": rate,
        "train/supervised_tokens": int(supervised),
        **({"train/update_skipped": 1.0} if skips else {}),
        **stats.metrics,
    }
    info = StepInfo(step, time.perf_counter() - started, int(tokens), int(squared_lengths), load_time_s)
    for hook in training.hooks:
        metrics |= hook.after_step(info)
    return metrics


def judge(run: Run, step: int, loss: float, norm: float) -> bool:
    """Return whether the update of a step was skipped, because its gradient norm is not finite.

    Raises:
        TrainingError: The loss or the norm is not finite, and `train.on_nonfinite` does not skip the step: it is
            `stop`, the update was applied because the norm is finite, or too many steps in a row were skipped.
    """
    if math.isfinite(loss) and math.isfinite(norm):
        run.skipped = 0
        return False
    run.skipped += 1
    if run.config.on_nonfinite == "skip" and not math.isfinite(norm) and run.skipped <= MOST_SKIPPED:
        return True
    settle(run)
    rule = f"loss is {loss}, gradient norm {norm}"
    if run.skipped > 1:
        rule += f", after {run.skipped - 1} steps in a row that were skipped"
    way_out = "lower optim.learning_rate, or inspect the rows of this step"
    if run.config.on_nonfinite == "stop" and not math.isfinite(norm):
        way_out += "; train.on_nonfinite=skip skips such steps"
    raise TrainingError.of(f"step {step}", rule, way_out)


def has_passed(run: Run, minutes: float | None) -> bool:
    """Return whether the last checkpoint was saved `minutes` before this step began; never if they are None."""
    return minutes is not None and run.since_save_s >= 60 * minutes


def step_seed(seed: int, step: int, rank: int) -> int:
    """Return the seed of dropout and NEFTune noise, with which a resumed run draws the same as an uninterrupted one.

    The draws depend on the shape of each micro-batch on each rank. With dropout or noise, the loss curve is therefore
    the same only for the same engine, world size, micro-batch size and packing. The seed has 64 bits, as torch's
    generators require.
    """
    return ((seed * 1_000_003 + step) * 65_537 + rank) % 2**64


def assess(run: Run, step: int, *, counts: bool = True, may_stop: bool = False) -> None:
    """Evaluate on the validation split, if there is one, and log; with `counts`, also update the best step.

    Raises:
        StopAgreed: A rank was asked to stop during the evaluation, and `may_stop` is set.
    """
    if run.validation is None:
        return
    run.progress = replace(run.progress, evaluation_pending=may_stop)
    run.beat(f"evaluation at step {step}")
    totals = evaluate(
        run.training.engine,
        run.validation.batches(),
        tick_calls(run.validation.task.score, run.tick),
        run.beat,
        run.stop if may_stop else None,
    )
    run.progress = replace(run.progress, evaluation_pending=False)
    found = run.validation.task.metrics(totals, run.validation.rows) if run.rank == 0 else {}
    metrics = {f"eval/{name}": value for name, value in comm.from_main(found).items()}
    run.records.tracker.log(metrics, step=step)
    score = score_of(metrics, run.config.metric_for_best_model)
    if not counts:
        return
    if is_better(score, run.progress.best_score, run.config.metric_for_best_model):
        run.progress = replace(run.progress, best_score=score, best_step=step, stale_evaluations=0)
    else:
        run.progress = replace(run.progress, stale_evaluations=run.progress.stale_evaluations + 1)


def score_of(metrics: Metrics, name: str) -> float:
    """Return the metric that `train.metric_for_best_model` names.

    Raises:
        TrainingError: The task has no such metric.
    """
    if f"eval/{name}" not in metrics:
        known = ", ".join(key.removeprefix("eval/") for key in metrics)
        raise TrainingError.of("train.metric_for_best_model", f"there is no metric eval/{name}", f"use one of {known}")
    return metrics[f"eval/{name}"]


def is_better(score: float, best: float | None, name: str) -> bool:
    """Return whether a score is the best so far; losses, errors and perplexities are better when lower.

    One that is not finite is never the best.
    """
    if not math.isfinite(score):
        return False
    return best is None or (score < best if name.partition("/")[0] in LOWER_IS_BETTER else score > best)


def evaluate(engine: Engine, batches: Iterator[Batch], score: LossFn, beat: Beat, stop: Stop | None = None) -> LossSum:
    """Sum the scores over all rows and ranks: the result does not depend on world size or batch size.

    Raises:
        StopAgreed: A rank was asked to `stop`.
    """
    sums, agreement = Sums(), comm.Agreement()
    for i, batch in enumerate(batches, start=1):
        if stop is not None and agreement.reached(stop.cause is not None):
            raise StopAgreed
        beat(f"evaluation, micro-batch {i}")
        sums.add(engine.evaluate(batch, score))
    everyone = [prediction for part in comm.gather(sums.predictions) for prediction in part]
    everyone.sort(key=lambda prediction: prediction["sample"])
    return replace(sums.total(), predictions=everyone)


def tick_calls(score: LossFn, tick: Beat) -> LossFn:
    """Tick on every call of the model inside `score`, since generating a text takes one call per token."""

    def ticking(model: nn.Module, batch: Batch) -> LossSum:
        # generate() calls the transformers model itself and bypasses the wrappers of engines and methods.
        called = [module for module in model.modules() if hasattr(module, "generate")]
        hooks = [
            module.register_forward_pre_hook(lambda *_: tick("evaluation, a call of the model")) for module in called
        ]
        try:
            return score(model, batch)
        finally:
            for hook in hooks:
                hook.remove()

    return ticking


def due(step: int, every: int | None) -> bool:
    """Return whether an action that is repeated `every` steps is due at `step`; never if `every` is None."""
    return every is not None and step % every == 0


def keeps_best(config: TrainConfig) -> bool:
    """Return whether a checkpoint is saved after an evaluation that is the best so far."""
    return bool(config.saves_on_the_way or config.early_stopping_patience or config.load_best_model_at_end)


def out_of_patience(run: Run) -> bool:
    """Return whether the last `early_stopping_patience` evaluations brought no improvement."""
    patience = run.config.early_stopping_patience
    return patience is not None and run.progress.stale_evaluations >= patience
