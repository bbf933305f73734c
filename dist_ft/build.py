"""From a plan to a run: the only place that knows every family, each by a literal table."""

from __future__ import annotations

import hashlib
import resource
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TextIO

import torch
from torch import nn

from . import checkpoint, comm
from .card import card_of_run
from .checkpoint import Progress
from .comm import Place
from .data.loader import Loader, evaluation_batches
from .data.order import Order, total_steps
from .errors import MachineError, RequestError
from .export import export_run
from .exported import EXPORT
from .loop import Run
from .method.full import Full
from .method.lora import Lora
from .model.attention import AttentionChoice
from .model.flops import StepCost, count_step_cost, peak_flops
from .model.load import attention_of, load_model
from .model.moe import apply_policy, check_keys, route_method, share_buffers
from .model.routing import Routing, Watched, build_routing, watch
from .optim import build_adamw, learning_rate
from .plan import Plan
from .prepare import TASKS, Prepared, Split
from .probe import take_probe
from .schema import OptimConfig, RunConfig
from .state import Engine, Method, Metrics, ModelFactory, OptimFactory, Task, Tracker
from .track.compose import NullTracker, Trackers
from .track.jsonl import METRICS_FILE, JsonLines, read_evaluations
from .track.progress import open_progress
from .track.wandb import open_wandb
from .turns import find_end_token, open_tokenizer

CHECKPOINTS = "checkpoints"

METHODS: dict[str, Callable[..., Method]] = {"full": Full, "lora": Lora}


def build_task(config: RunConfig, *, padding_free: bool) -> Task:
    """The task, laying out micro-batches for a model that takes documents without padding, or not.

    Raises:
        RequestError: packing was asked for with a model whose attention cannot keep documents apart.
    """
    if config.task.packing and not padding_free:
        rule = f"{config.model.name_or_path}'s attention cannot keep packed documents apart"
        raise RequestError.of("task.packing", rule, "set task.packing=false")
    return TASKS[config.task.name](config.task, padding_free=padding_free)


def build_method(config: RunConfig) -> Method:
    """The method of the configuration."""
    return METHODS[config.method.name](config.method)


def build_engine(plan: Plan, place: Place, device: torch.device) -> Engine:
    """The engine of the configuration; DeepSpeed is imported only for its own."""
    config = plan.config
    options: dict[str, Any] = {
        "device": device,
        "place": place,
        "dtype": getattr(torch, config.model.dtype),
        "max_grad_norm": config.optim.max_grad_norm,
    }
    if config.engine.name == "ddp":
        from .engine.ddp import Ddp

        return Ddp(**options)
    if config.engine.name == "fsdp":
        from .engine.fsdp import Fsdp

        return Fsdp(config.engine, **options)
    from .engine.deepspeed import Zero

    options |= {
        "micro_batch_size": config.train.per_device_train_batch_size,
        "accumulation_steps": plan.accumulation_steps,
    }
    return Zero(config.engine, **options)


def model_factory(config: RunConfig, folder: str, attention: AttentionChoice, method: Method) -> ModelFactory:
    """How every rank builds the same modules; see state.ModelFactory."""

    def build_model(weights: bool) -> nn.Module:
        model = load_model(config.model, folder, attention, weights=weights)
        routed = route_method(config.method, config.moe, model)
        torch.manual_seed(config.train.seed)  # what a method adds starts alike on every rank
        model = (method if routed is config.method else METHODS[routed.name](routed)).apply(model)
        apply_policy(config.moe, config.method, model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()  # master precision; engines compute in model.dtype
        return model

    return build_model


def optim_factory(config: OptimConfig, device: torch.device) -> OptimFactory:
    """How an engine makes the optimizer over the parameters as it holds them."""

    def build_optim(parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        return build_adamw(config, parameters, fused=device.type in ("cpu", "cuda"))

    return build_optim


def build_loader(plan: Plan, task: Task, split: Split, place: Place) -> tuple[Loader, int]:
    """The training data of this rank, and the number of steps."""
    train = plan.config.train
    table, samples = split.open_table(), split.open_samples()
    steps, rows = total_steps(len(samples), train.global_batch_size, train.max_steps, train.num_train_epochs)
    order = Order(len(samples), train.seed, plan.config.data.shuffle, train.global_batch_size, rows)
    loader = Loader(
        table,
        samples,
        task.collate,
        order,
        rank=place.rank,
        world=place.world_size,
        per_device=train.per_device_train_batch_size,
    )
    return loader, steps


def build_validation(plan: Plan, task: Task, prepared: Prepared, place: Place) -> Callable[[], Any] | None:
    """Micro-batches of the validation split, every row once over all ranks; None without the split."""
    split = prepared.validation
    if split is None:
        return None
    table, samples = split.open_table(), split.open_samples()
    return lambda: evaluation_batches(
        table,
        samples,
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
    attention = attention_of(config.model, prepared.model_dir, device)
    task = build_task(config, padding_free=attention.padding_free)
    loader, steps = build_loader(plan, task, prepared.train, place)
    engine = build_engine(plan, place, device)
    costs: list[StepCost] = []
    routings: list[Routing] = []
    method = build_method(config)
    factory = model_factory(config, prepared.model_dir, attention, method)

    def build_model(weights: bool) -> nn.Module:
        model = factory(weights)
        check_keys(config.moe, plan.origins, model)
        _check_alike(model)
        share_buffers(model)
        costs.append(count_step_cost(model))
        routings.extend(build_routing(config.moe, config.method, model))
        return model

    engine.setup(build_model, optim_factory(config.optim, device))
    progress = resume(plan, engine, place)
    watched = Watched(task, loader.step, meter(device, place.world_size, costs[0]))
    for routing in routings:  # one for a mixture of experts, none for a dense model
        watched = watch(routing, watched, engine, beat)
    if place.is_main:
        print(describe(plan, attention, device, progress, steps, routings), file=terminal, flush=True)
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
        learning_rate=lambda step: learning_rate(config.optim, step, steps),
        epoch_at=loader.order.epoch_at,
        save=lambda progress: save_checkpoint(plan, engine, progress, place),
        beat=beat,
        measure=watched.measure,
        export=lambda: export(plan, prepared, place, engine, task, method, factory),
    )


def build_tracker(
    plan: Plan, place: Place, progress: Progress, steps: int, terminal: TextIO
) -> tuple[Tracker, str | None]:
    """Rank 0's trackers, and the W&B run's id; the other ranks track nothing."""
    if not place.is_main:
        return NullTracker(), progress.tracker_id
    config = plan.config
    wandb, identity = open_wandb(
        config.track,
        run_dir=plan.run_dir,
        run_name=config.run_name,
        settings=config.model_dump(mode="json"),
        run_id=progress.tracker_id,
        warn=lambda sentence: print(f"dist-ft: {sentence}", file=terminal, flush=True),
    )
    lines = JsonLines(plan.run_dir / METRICS_FILE, after_step=progress.step)
    return Trackers([lines, open_progress(steps, after_step=progress.step, file=terminal), wandb]), identity


def describe(
    plan: Plan,
    attention: AttentionChoice,
    device: torch.device,
    progress: Progress,
    steps: int,
    routings: Sequence[Routing] = (),
) -> str:
    """What runs, in a few lines: also what every `auto` became."""
    config = plan.config
    layout = "documents without padding" if attention.padding_free else "padded rows"
    begin = f"from the checkpoint of step {progress.step}" if progress.step else "from the start"
    return (
        f"dist-ft: {config.method.name} of {config.model.name_or_path} by {config.engine.name} on {plan.world_size} "
        f"{device.type} worker(s), {steps} steps {begin}; output in {plan.run_dir}\n"
        f"dist-ft: compute {config.model.dtype}, trained weights and AdamW float32; attention {attention.kernel} "
        f"({attention.reason}), {layout}"
    ) + "".join(f"\ndist-ft: {routing.describe()}" for routing in routings)


def summarise(plan: Plan, step: int) -> str:
    """What came of it: the first and the last evaluation side by side, and where the model is."""
    before, after = read_evaluations(plan.run_dir / METRICS_FILE)
    changes = [f"{name} {before[name]:.4f} → {after[name]:.4f}" for name in after if name in before and name != "step"]
    lines = [f"dist-ft: trained {step} steps" + (": " + ", ".join(changes) if changes else "")]
    lines.append(f"dist-ft: model in {plan.run_dir / EXPORT}, loaded again to the same logits")
    return "\n".join(lines)


def resume(plan: Plan, engine: Engine, place: Place) -> Progress:
    """Bring the engine to where the run stands, and say where that is; a new run stands at step 0.

    Raises:
        RequestError: the checkpoint named by train.resume is not sound.
    """
    wish, folder = plan.config.train.resume, plan.run_dir / CHECKPOINTS
    path: Path | None = None
    if place.is_main and wish == "auto":
        path, torn = checkpoint.newest_sound(folder)
        for problem in torn:
            print(f"dist-ft: {problem}", flush=True)
    elif wish not in ("auto", "never"):
        path = Path(wish)
        if reason := checkpoint.verify(path):
            raise RequestError.of("train.resume", f"{path}: {reason}", "name a sound checkpoint, or use auto")
    path = comm.from_main(path)
    if path is None:
        return Progress(0, place.world_size, plan.config.engine.name, None, None, None, 0)
    state = engine.state()
    checkpoint.load(path, state)
    engine.load(state)
    return checkpoint.read_progress(path)


def save_checkpoint(plan: Plan, engine: Engine, progress: Progress, place: Place) -> None:
    """Write a checkpoint, point `best` at it if it is the best, and remove what is no longer kept."""
    folder = plan.run_dir / CHECKPOINTS
    path = checkpoint.save(folder, engine.state(), progress)
    if place.is_main:
        if progress.best_step == progress.step:
            checkpoint.point(folder / "best", path)
        checkpoint.prune(folder, plan.config.train.save_total_limit, progress.best_step)


def export(
    plan: Plan, prepared: Prepared, place: Place, engine: Engine, task: Task, method: Method, factory: ModelFactory
) -> None:
    """Write the trained model into the run's folder, and see that it loads to the same logits. Every rank takes part."""
    config = plan.config
    probe = take_probe(engine, task, prepared.train.open_table().example(0)["input_ids"])
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir) if place.is_main else None
    export_run(
        method=method,
        model_config=config.model,
        model_dir=prepared.model_dir,
        build_model=factory,
        tokenizer=tokenizer,
        end_token_id=find_end_token(tokenizer, config.task),
        weights=engine.weights(trainable=config.method.name != "full"),
        out=plan.run_dir / EXPORT,
        card=card_of_run(plan, prepared, plan.run_dir) if place.is_main else "",
        probe=probe,
        is_main=place.is_main,
    )


def meter(device: torch.device, world_size: int, cost: StepCost) -> Callable[[float, int, int], Metrics]:
    """The function behind `perf/*`: (step time in s, tokens, squared document lengths, of all ranks) → metrics."""
    peak = peak_flops(device)

    def measure(step_time_s: float, tokens: int, squared_lengths: int) -> Metrics:
        metrics = {
            "perf/tokens_per_second": tokens / step_time_s,
            "perf/step_time_s": step_time_s,
            "perf/peak_memory_bytes": float(peak_memory_bytes(device)),
        }
        if peak is not None:
            metrics["perf/mfu"] = cost.of(tokens, squared_lengths) / step_time_s / (peak * world_size)
        return metrics

    return measure


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory that this rank has held: on its GPU, or of its process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


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
