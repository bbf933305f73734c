"""Print a plan: the run, the batch arithmetic, resolved `auto` values, origins of set keys, and the command."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..checks.batch import AUTO, GLOBAL, MICRO
from ..checks.keys import value_of
from ..checks.precision import DTYPE
from ..config.plan import CHECKPOINTS, Plan, saved_steps
from ..track.needs import describe_mode, missing_package
from .composition.compose import compose
from .composition.file import LEFT_OUT
from .composition.written import write_config
from .launcher import GPUS, Rendered
from .machine.environ import variable


def show_plan(plan: Plan, rendered: Rendered) -> None:
    """Print a plan."""
    for title, lines in (
        ("run", run_lines(plan)),
        ("batch", batch_lines(plan)),
        ("auto", (*auto_lines(plan), *rendered.notes)),
        ("set by you", origin_lines(plan)),
        ("would write", (f"{plan.run_dir / name}" for name in ("run.yaml", *rendered.files))),
        ("would run", (" ".join(map(shlex.quote, rendered.command)), rendered.start)),
    ):
        print(title)
        for line in list(lines) or ["nothing"]:
            print(f"  {line}")


def config_text(plan: Plan, words: Sequence[str], config_dir: str | Path | None) -> str:
    """Return the configuration of a plan as a YAML file that plans the same run.

    Args:
        plan: The plan, whose batch sizes are written where they were set: they may have been adapted.
        words: Arguments of the command line from which it was planned.
        config_dir: Folder with the user's own groups.
    """
    composed = compose(words, config_dir)
    train = composed.typed.train.model_copy(
        update={key.partition(".")[2]: value_of(plan.config, key) for key in (GLOBAL, MICRO) if key in composed.origins}
    )
    return write_config(composed.typed.model_copy(update={"train": train}), composed.origins)


def run_lines(plan: Plan) -> Iterator[str]:
    """Yield the name and folder of the run and the choice of each group."""
    config = plan.config
    yield f"{config.run_name} in {plan.run_dir}"
    yield f"model {config.model.name_or_path} ({config.model.dtype})"
    yield f"task {config.task.name}, method {config.method.name}"
    yield f"engine {config.engine.name}, launch {config.launch.name}, git {plan.git_sha or 'not a git checkout'}"
    yield f"workers {plan.world_size} = {plan.nodes} nodes × {plan.workers_per_node}"


def batch_lines(plan: Plan) -> Iterator[str]:
    """Yield the batch sizes, tokens and length of training."""
    train = plan.config.train
    unit = "blocks" if getattr(plan.config.task, "packing", False) else "rows"
    yield (
        f"{train.global_batch_size} {unit} per step = {plan.world_size} workers × {train.per_device_train_batch_size} "
        f"{unit} per micro-batch × {plan.accumulation_steps} micro-batches"
    )
    yield f"at most {train.global_batch_size * plan.config.task.max_length} tokens per step"
    yield f"for {train.max_steps} steps" if train.max_steps else f"for {train.num_train_epochs} epochs"


def auto_lines(plan: Plan) -> Iterator[str]:
    """Yield the values of `auto` keys, as far as they are known before the start."""
    config = plan.config
    yield from adapted_lines(plan)
    if getattr(config.launch, "workers_per_node", None) in ("auto", None):
        yield f"launch.workers_per_node → {plan.workers_per_node}"
    if config.train.resume == "auto":
        newest = next(iter(saved_steps(plan.run_dir / CHECKPOINTS)), None)
        begin = f"resumes after {newest.name.replace('-', ' ')} if it is valid" if newest else "starts from step 0"
        yield f"train.resume → {begin}"
    if config.track.uses_wandb:
        yield f"track.wandb → {describe_mode(config.track.wandb, variable)}"
    for problem in filter(None, map(missing_package, config.track.others)):
        yield f"track.to → {problem.rule}; {problem.way_out}"


def adapted_lines(plan: Plan) -> Iterator[str]:
    """Yield the keys that were adapted to the workers, with the reason."""
    for key in (GPUS, DTYPE, GLOBAL, MICRO):
        if plan.origins.get(key, "").startswith(AUTO):
            yield f"{key} → {value_of(plan.config, key)} ({plan.origins[key].removeprefix(f'{AUTO}: ')})"


def left_out_lines(plan: Plan) -> Iterator[str]:
    """Yield the keys that were dropped because of what the user set."""
    for key, origin in plan.origins.items():
        if origin.startswith(LEFT_OUT):
            yield f"{key}: {origin}"


def origin_lines(plan: Plan) -> Iterator[str]:
    """Yield the keys that the user set, with their values and origins."""
    tree = plan.config.model_dump(mode="json")
    for key, origin in plan.origins.items():
        if origin.startswith(AUTO):
            continue
        value: Any = tree
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        choice = "." not in key and (value is None or isinstance(value, dict))
        yield f"{key}   ({origin})" if choice else f"{key} = {value}   ({origin})"
