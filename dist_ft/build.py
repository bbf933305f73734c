"""Construction of a run from its plan: data, task, model, method and engine, step by step."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import nn

from .assess.reference import refer_to_start
from .checkpoint.resume import choose_start, describe_room, restore, resume, save_checkpoint, settle_start
from .checkpoint.saver import Saver
from .config.plan import CHECKPOINTS, EXPORT, Plan
from .config.run import RunConfig
from .data.order.ahead import Ahead, Batches
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
    ModelRecipe,
    architecture_of,
    build_engine,
    build_method,
    build_task,
    choose_attention,
    optim_factory,
    settle_head,
)
from .inspect.record import record_start
from .loop import Records, Run, Training, Validation
from .model.anatomy import share_buffers
from .model.flops import StepCost, count_step_cost
from .model.meter import Meter
from .model.moe.policy import check_keys, describe_unmeasured
from .model.moe.routing import Routing, RoutingHook, build_routing
from .model.reach import name_idle
from .model.ticking import ticking
from .optim.schedule import learning_rate
from .prepare import Prepared, describe_data
from .pretrained.folder import stored_scheme
from .privacy.mechanism import Privacy, agree_on_privacy, settle_seed
from .privacy.rules import MIXES_ROWS, takes_rows_together
from .process import comm
from .process.place import Place, Worker
from .protocols import Engine, Hook, Task
from .state import Anatomy, Batch, BuiltModel, Progress
from .task.by_set import LossBySet, ScoreBySet
from .task.routed import RoutedTask
from .track.messages import describe
from .track.pace import Pace
from .track.trackers import build_tracker


def build(plan: Plan, prepared: Prepared, worker: Worker) -> Run:
    """Build everything of a run and, if there is a checkpoint to resume from, load it. Collective."""
    config = plan.config
    start = choose_start(plan, prepared, worker)
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, worker.device, architecture)
    task = build_task(config, prepared.facts, attention)
    order, steps = build_order(plan, prepared.train, worker.place)
    privacy = build_privacy(config, order, steps)
    settle_start(plan, worker.place)
    method = build_method(config, plan.run_dir)
    recipe = ModelRecipe(config, prepared.model_dir, attention, architecture, method)
    built = build_model(plan, recipe, worker, privacy)
    loss = settle_head(config, task, built.anatomy.model)
    room = describe_room(plan, built.model) if start.progress.step < steps else None
    record_start(plan, prepared, built, worker)
    cost, routing = count_step_cost(built), build_routing(config.moe, config.method, built.anatomy)
    engine = build_engine(plan, worker, privacy)
    engine.setup(built, optim_factory(config, worker.device))
    prepared = refer_to_start(plan, prepared, task, engine, worker)  # before a checkpoint is loaded
    progress = resume(start, engine, worker, steps)
    training = build_training(plan, prepared, task, engine, order, steps, cost, routing, worker)
    validation = build_validation(plan, prepared, task, worker)
    for line in (
        *describe(plan, attention, worker.device, progress, steps),
        *filter(None, [loss, room]),
        *describe_parts(plan, prepared, built.anatomy, routing, privacy, steps),
    ):
        worker.say(line)
    records, progress = build_records(plan, prepared, task, engine, recipe, progress, steps, worker)
    return Run(
        config.train,
        worker.place.rank,
        training,
        validation,
        records,
        worker.beat,
        progress,
        worker.tick,
        worker.stop,
    )


def build_order(plan: Plan, split: Split, place: Place) -> tuple[Order, int]:
    """Build the order that says which samples each step sees, and the number of steps.

    Raises:
        RequestError: The global batch size of a private run exceeds the number of rows.
    """
    train, shuffle = plan.config.train, plan.config.data.shuffle
    samples, batch = len(split.open_samples()), train.global_batch_size
    steps, total = total_steps(samples, batch, train.max_steps, train.num_train_epochs)
    if plan.config.privacy.is_on:
        if batch > samples:
            rule = f"a step cannot sample {batch} of {samples} rows"
            raise RequestError.of("train.global_batch_size", rule, f"set it to at most {samples}")
        return PoissonOrder(samples, settle_seed(plan, place), batch, total), steps
    if split.parts:
        quotas, sizes = quotas_of(plan.config, split.sizes), list(split.sizes.values())
        return MixedOrder(sizes, quotas, train.seed, shuffle, batch, total), steps
    return Order(samples, train.seed, shuffle, batch, total), steps


def build_loader(plan: Plan, task: Task, split: Split, place: Place, order: Order) -> Loader:
    """Build the loader of this rank's training micro-batches."""
    return Loader(
        split.open_table(),
        split.open_samples(),
        task.collate,
        order,
        rank=place.rank,
        world=place.world_size,
        per_device=plan.config.train.per_device_train_batch_size,
    )


def build_privacy(config: RunConfig, order: Order, steps: int) -> Privacy | None:
    """Build the mechanism of a private run; None for other runs."""
    if not isinstance(order, PoissonOrder):
        return None
    return replace(agree_on_privacy(config.privacy, order, steps), hooks=takes_rows_together(config))


def build_model(plan: Plan, recipe: ModelRecipe, worker: Worker, privacy: Privacy | None) -> BuiltModel:
    """Build the model on every rank, on rank 0 with weights. Collective.

    Raises:
        RequestError: `moe.*` keys are set for a dense model, or a private run has a mixture of experts.
        MachineError: Ranks built different parameters.
    """
    with ticking(worker.tick):
        built = recipe.build(weights=worker.place.is_main, tick=worker.tick)
    check_keys(plan.config.moe, plan.origins, built.anatomy)
    if built.anatomy.mixtures and privacy is not None:
        raise RequestError.of("privacy", MIXES_ROWS, "use a model without experts")
    check_alike(built.model)
    share_buffers(built.model)
    return built


def check_alike(model: nn.Module) -> None:
    """Check that all ranks have the same parameters; otherwise, training would be wrong or hang. Collective.

    Raises:
        MachineError: Ranks built different parameters.
    """
    names = "\n".join(f"{name} {tuple(p.shape)} {p.dtype} {p.requires_grad}" for name, p in model.named_parameters())
    digests = comm.gather(hashlib.sha256(names.encode()).hexdigest())
    if len(set(digests)) > 1:
        ranks = [rank for rank, digest in enumerate(digests) if digest != digests[0]]
        raise MachineError.of(
            f"ranks {ranks}",
            "built different parameters than rank 0 from the same plan",
            "install the same versions (dist-ft doctor) and use the same model folder on all hosts",
        )


def build_training(
    plan: Plan,
    prepared: Prepared,
    task: Task,
    engine: Engine,
    order: Order,
    steps: int,
    cost: StepCost,
    routing: Routing | None,
    worker: Worker,
) -> Training:
    """Build the parts of training: the task with its wrappers, the data of this rank, and the hooks."""
    config, place, split = plan.config, worker.place, prepared.train
    if split.parts:
        task = LossBySet(task, split.sizes)
    batches: Batches = build_loader(plan, task, split, place, order).step
    if worker.device.type == "cuda":
        batches = Ahead(batches, Batch.pinned, steps, partial(torch.cuda.set_device, worker.device)).step
    pace = Pace(worker)
    hooks: list[Hook] = [Meter(worker.device, place.world_size, cost), pace]
    if routing is not None:
        hooks.append(RoutingHook(routing, engine, task.loss, worker.beat))
    return Training(
        task=task if routing is None else RoutedTask(task, routing),
        engine=engine,
        batches=batches,
        learning_rate=partial(learning_rate, config.optim, total_steps=steps),
        epoch_at=order.epoch_at,
        total_steps=steps,
        hooks=hooks,
        timed=pace.timed,
        may_be_empty=config.privacy.is_on,
    )


def build_validation(plan: Plan, prepared: Prepared, task: Task, worker: Worker) -> Validation | None:
    """Build the parts of evaluation, which divide the validation split over ranks; None if there is no such split."""
    split = prepared.validation
    if split is None:
        return None
    return Validation(
        task=ScoreBySet(task, split.sizes) if split.parts else task,
        batches=partial(
            split_batches,
            split,
            task.collate,
            rank=worker.place.rank,
            world=worker.place.world_size,
            per_device=plan.config.train.per_device_eval_batch_size,
        ),
        rows=split.read_rows() if worker.place.is_main else (),
    )


def build_records(
    plan: Plan,
    prepared: Prepared,
    task: Task,
    engine: Engine,
    recipe: ModelRecipe,
    progress: Progress,
    steps: int,
    worker: Worker,
) -> tuple[Records, Progress]:
    """Open the trackers and bind checkpoints and export to the run; stores the W&B run ID in the progress."""
    place = worker.place
    tracker, tracker_id = build_tracker(plan, progress, steps, worker)
    saver = Saver(plan.run_dir / CHECKPOINTS, asynchronous=plan.config.train.async_save, tick=worker.tick)
    if plan.config.train.saves_on_the_way and progress.step < steps:
        saver.reserve(engine.state())
    records = Records(
        tracker=tracker,
        save=partial(save_checkpoint, plan, engine, saver, worker),
        restore=partial(restore, plan, engine, worker),
        export=partial(export, plan, prepared, task, engine, recipe, worker),
        settle=saver.settle,
        failure=lambda: saver.failure,
    )
    engine_name = plan.config.engine.name
    return records, replace(progress, tracker_id=tracker_id, world_size=place.world_size, engine=engine_name)


def describe_parts(
    plan: Plan,
    prepared: Prepared,
    anatomy: Anatomy,
    routing: Routing | None,
    privacy: Privacy | None,
    steps: int,
) -> Iterator[str]:
    """Yield a line for each feature that only some runs have."""
    scheme = stored_scheme(Path(prepared.model_dir))
    if scheme is not None and not plan.config.model.from_scratch:
        yield f"the weights in {prepared.model_dir} are quantized ({scheme}): dequantized while they were read"
    if anatomy.idle:
        yield f"frozen, because no text reaches it: {name_idle(anatomy)}"
    if routing is not None:
        yield routing.describe()
    yield from describe_unmeasured(anatomy)
    yield from describe_mixture(plan.config, prepared.train)
    yield from describe_data(plan.config, prepared)
    if privacy is not None:
        yield privacy.describe(steps)


def export(plan: Plan, prepared: Prepared, task: Task, engine: Engine, recipe: ModelRecipe, worker: Worker) -> None:
    """Write the trained model to the run's folder and check that the reloaded model has the same logits. Collective."""
    config = plan.config
    probe = take_probe(engine, task, prepared.train.first_sample())
    weights = engine.weights(trainable=not config.method.whole)
    if not worker.place.is_main:
        for name, _ in weights:
            worker.tick(f"sending {name}")
        return
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    export_run(
        method=recipe.method,
        model_config=config.model,
        model_dir=recipe.folder,
        architecture=recipe.architecture,
        bare=recipe.build_meta().model,
        tokenizer=tokenizer,
        end_token_id=find_end_token(tokenizer, config.task),
        weights=weights,
        out=plan.run_dir / EXPORT,
        card=card_of_run(plan, prepared, plan.run_dir),
        probe=probe,
        tell=worker.say,
        tick=worker.tick,
    )
