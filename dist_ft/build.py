"""From a plan to a run: data, task, model, method and engine put together."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TextIO

import torch
from torch import nn

from .assess.reference import refer_to_start
from .checkpoint.resume import restore, resume, save_checkpoint, settle_start
from .config.plan import EXPORT, Plan
from .config.run import RunConfig
from .data.order.interleave import MixedOrder
from .data.order.loader import Loader, split_batches
from .data.order.order import Order, PoissonOrder, total_steps
from .data.order.proportions import describe_mixture, quotas_of
from .data.render.template import find_end_token
from .data.render.tokenizer import open_tokenizer
from .data.store.opened import Split
from .errors import MachineError, RequestError
from .export.card import card_of_run
from .export.probe import take_probe
from .export.write import export_run
from .families import (
    architecture_of,
    build_engine,
    build_method,
    build_task,
    choose_attention,
    model_factory,
    optim_factory,
)
from .loop import Run
from .model.attention import AttentionChoice
from .model.flops import StepCost, count_step_cost
from .model.meter import meter
from .model.moe.policy import check_keys, share_buffers
from .model.moe.routing import Routing, Watched, build_routing, watch
from .optim.schedule import learning_rate
from .prepare import Prepared
from .privacy.mechanism import Privacy, build_privacy, settle_seed
from .privacy.rules import MIXES_ROWS, takes_rows_together
from .process import comm
from .process.place import Place
from .state import Architecture, Engine, Method, ModelFactory, Task
from .task.by_set import split_losses, split_scores
from .track.messages import describe
from .track.trackers import build_tracker


def build_order(plan: Plan, split: Split, place: Place) -> tuple[Order, int]:
    """Which samples each step sees, and the number of steps."""
    train, shuffle = plan.config.train, plan.config.data.shuffle
    samples = len(split.open_samples())
    steps, rows = total_steps(samples, train.global_batch_size, train.max_steps, train.num_train_epochs)
    if plan.config.privacy.is_on:
        return _build_poisson(plan, samples, rows, settle_seed(plan, place)), steps
    if split.parts:
        quotas, sizes = quotas_of(plan.config, split.sizes), list(split.sizes.values())
        return MixedOrder(sizes, quotas, train.seed, shuffle, train.global_batch_size, rows), steps
    return Order(samples, train.seed, shuffle, train.global_batch_size, rows), steps


def build_loader(plan: Plan, task: Task, split: Split, place: Place, order: Order) -> Loader:
    """The training data of this rank."""
    return Loader(
        split.open_table(),
        split.open_samples(),
        task.collate,
        order,
        rank=place.rank,
        world=place.world_size,
        per_device=plan.config.train.per_device_train_batch_size,
    )


def _build_poisson(plan: Plan, samples: int, samples_total: int, seed: int) -> PoissonOrder:
    """Which rows each step of a private run sees.

    Raises:
        RequestError: a step is to have more rows than there are.
    """
    batch = plan.config.train.global_batch_size
    if batch > samples:
        rule = f"a step cannot sample {batch} rows of {samples}"
        raise RequestError.of("train.global_batch_size", rule, f"set it to at most {samples}")
    return PoissonOrder(samples, seed, batch, samples_total)


def build_validation(plan: Plan, task: Task, prepared: Prepared, place: Place) -> Callable[[], Any] | None:
    """Micro-batches of the validation split, every row once over all ranks; None without the split."""
    split = prepared.validation
    if split is None:
        return None
    return lambda: split_batches(
        split,
        task.collate,
        rank=place.rank,
        world=place.world_size,
        per_device=plan.config.train.per_device_eval_batch_size,
    )


def build(
    plan: Plan, prepared: Prepared, place: Place, device: torch.device, terminal: TextIO, beat: Callable[[str], None]
) -> Run:
    """Everything of a run, set up and, where there is a checkpoint to go on from, resumed.

    `terminal` is where rank 0 shows progress; `beat` tells a watchdog how far this rank has come.
    """
    config = plan.config
    architecture, attention, task = _find_form(config, prepared, device)
    order, steps = build_order(plan, prepared.train, place)
    engine = build_engine(plan, place, device, privacy := _find_privacy(config, order, steps))
    costs: list[StepCost] = []
    routings: list[Routing] = []
    settle_start(plan, place)
    method = build_method(config, plan.run_dir)
    factory = model_factory(config, prepared.model_dir, attention, architecture, method)

    def build_model(weights: bool) -> nn.Module:
        model = factory(weights)
        check_keys(config.moe, plan.origins, model)
        _check_alike(model)
        share_buffers(model)
        costs.append(count_step_cost(model))
        routings.extend(build_routing(config.moe, config.method, model))
        _check_apart(routings, privacy)
        return model

    engine.setup(build_model, optim_factory(config, device))
    prepared = refer_to_start(plan, prepared, task, engine, place, terminal, beat)  # no checkpoint was read yet
    loader = build_loader(plan, task, prepared.train, place, order)
    progress = resume(plan, engine, place, terminal)
    told = split_losses(split_scores(task, prepared.validation), prepared.train)
    watched = Watched(told, loader.step, meter(device, place.world_size, costs[0]))
    for routing in routings:  # one for a mixture of experts, none for a dense model
        watched = watch(routing, watched, engine, beat)
    if place.is_main:
        notes = _notes(plan, prepared, routings, privacy, steps)
        print(describe(plan, attention, device, progress, steps, notes), file=terminal, flush=True)
    tracker, tracker_id = build_tracker(plan, place, progress, steps, terminal)
    return Run(
        config=config.train,
        task=watched.task,
        engine=engine,
        tracker=tracker,
        hooks=[],
        total_steps=steps,
        progress=replace(progress, tracker_id=tracker_id, world_size=place.world_size, engine=config.engine.name),
        rank=place.rank,
        micro_batches=watched.micro_batches,
        validation=build_validation(plan, task, prepared, place),
        validation_rows=prepared.validation.read_rows() if prepared.validation and place.is_main else (),
        learning_rate=lambda step: learning_rate(config.optim, step, steps),
        epoch_at=loader.order.epoch_at,
        save=lambda progress: save_checkpoint(plan, engine, progress, place),
        restore=lambda name: restore(plan, engine, name),
        beat=beat,
        measure=watched.measure,
        may_be_empty=privacy is not None,
        export=lambda: export(plan, prepared, place, engine, task, method, factory, terminal),
    )


def export(
    plan: Plan,
    prepared: Prepared,
    place: Place,
    engine: Engine,
    task: Task,
    method: Method,
    factory: ModelFactory,
    terminal: TextIO,
) -> None:
    """Write the trained model into the run's folder, and see that it loads to the same logits; all ranks take part."""
    config = plan.config
    probe = take_probe(engine, task, prepared.train.first_sample())
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir) if place.is_main else None
    export_run(
        method=method,
        model_config=config.model,
        model_dir=prepared.model_dir,
        architecture=architecture_of(config, prepared.facts),
        build_model=factory,
        tokenizer=tokenizer,
        end_token_id=find_end_token(tokenizer, config.task),
        weights=engine.weights(trainable=not config.method.whole),
        out=plan.run_dir / EXPORT,
        card=card_of_run(plan, prepared, plan.run_dir) if place.is_main else "",
        probe=probe,
        is_main=place.is_main,
        tell=lambda line: print(f"dist-ft: {line}", file=terminal, flush=True),
    )


def _find_form(
    config: RunConfig, prepared: Prepared, device: torch.device
) -> tuple[Architecture, AttentionChoice, Task]:
    """What the task needs of the model, how that attends here, and the task for it."""
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, device, architecture)
    return architecture, attention, build_task(config, prepared.facts, padding_free=attention.padding_free)


def _notes(
    plan: Plan, prepared: Prepared, routings: Sequence[Routing], privacy: Privacy | None, steps: int
) -> Sequence[str]:
    """What only some runs have to say of themselves."""
    found = [*(routing.describe() for routing in routings), *describe_mixture(plan.config, prepared.train)]
    return [*found, *prepared.describe_shared(), *([privacy.describe(steps)] if privacy else [])]


def _find_privacy(config: RunConfig, order: Order, steps: int) -> Privacy | None:
    """The mechanism of a private run, None for another."""
    if not isinstance(order, PoissonOrder):
        return None
    return replace(build_privacy(config.privacy, order, steps), hooks=takes_rows_together(config))


def _check_apart(routings: Sequence[Routing], privacy: Privacy | None) -> None:
    """A model's own modules have the last word on whether it has experts."""
    if routings and privacy is not None:
        raise RequestError.of("privacy", MIXES_ROWS, "take a model without experts")


def _check_alike(model: nn.Module) -> None:
    """Ranks that built different parameters would train garbage, or hang."""
    names = "\n".join(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters())
    digests = comm.gather(hashlib.sha256(names.encode()).hexdigest())
    if len(set(digests)) > 1:
        ranks = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise MachineError.of(
            f"ranks {ranks}",
            "built other parameters than rank 0 from the same plan",
            "see that all hosts have the same versions (dist-ft doctor) and the same model folder",
        )
