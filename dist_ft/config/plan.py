"""The plan of a run: the configuration with everything that follows from it, written once as run.yaml.

Workers read the plan and never compose configuration: a job that waits three days in a queue runs what was submitted.
"""

from __future__ import annotations

import datetime
import math
import os
import subprocess
import tempfile
from pathlib import Path

import yaml

from ..errors import Problem, RequestError
from .run import RunConfig
from .strict import Strict

# What a run's folder holds, by name.
RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
EXPORT = "model"
FAILURE_FILE = "failure.json"
START_FILE = "start.safetensors"  # initial LoRA factors of PiSSA and OLoRA
REFERENCE_FILE = "reference.safetensors"  # log-probabilities under the initial model, one tensor per split
SEED_FILE = "noise_seed"  # of a private run; readable by its owner only


class Plan(Strict):
    """What `run.yaml` holds."""

    config: RunConfig
    nodes: int
    workers_per_node: int
    world_size: int
    accumulation_steps: int  # micro-batches of one step on one rank
    git_sha: str | None  # of the working directory the run was planned in
    created: str  # UTC, ISO 8601
    origins: dict[str, str]  # dotted key → where its value came from, for keys that the user set

    @property
    def run_dir(self) -> Path:
        """The run's folder."""
        return Path(self.config.output_dir)

    @property
    def run_file(self) -> Path:
        """The path of `run.yaml`."""
        return self.run_dir / RUN_FILE


def batch_problems(config: RunConfig, world_size: int) -> list[Problem]:
    """The rules that tie batch sizes to the number of workers."""
    train = config.train
    micro = world_size * train.per_device_train_batch_size
    if train.global_batch_size % micro == 0:
        return []
    fits = [b for b in range(1, train.global_batch_size + 1) if train.global_batch_size % (world_size * b) == 0]
    best = min(fits, key=lambda b: abs(b - train.per_device_train_batch_size), default=None)
    multiple = math.ceil(train.global_batch_size / micro) * micro
    way_out = f"set train.global_batch_size={multiple}"
    if best is not None:
        way_out += f" or train.per_device_train_batch_size={best}"
    rule = (
        f"{train.global_batch_size} rows a step do not divide into micro-batches of "
        f"{train.per_device_train_batch_size} rows on {world_size} workers"
    )
    return [Problem("train.global_batch_size", rule, way_out)]


def make_plan(config: RunConfig, *, nodes: int, workers_per_node: int, origins: dict[str, str]) -> Plan:
    """Do the batch arithmetic for `nodes * workers_per_node` workers.

    Raises:
        RequestError: the batch sizes do not divide.
    """
    world_size = nodes * workers_per_node
    if problems := batch_problems(config, world_size):
        raise RequestError(*problems)
    return Plan(
        config=config,
        nodes=nodes,
        workers_per_node=workers_per_node,
        world_size=world_size,
        accumulation_steps=config.train.global_batch_size // (world_size * config.train.per_device_train_batch_size),
        git_sha=_git_sha(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        origins=origins,
    )


def write_plan(plan: Plan) -> Path:
    """Write `run.yaml` into the run's folder, whole or not at all, and return its path."""
    plan.run_dir.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    with tempfile.NamedTemporaryFile("w", dir=plan.run_dir, delete=False, encoding="utf-8") as file:
        file.write("# The plan of this run: resolved configuration and what follows from it. Workers read this.\n")
        file.write(text)
    os.chmod(file.name, 0o644)
    os.replace(file.name, plan.run_file)
    return plan.run_file


def read_plan(path: str | Path) -> Plan:
    """Read a `run.yaml`, or that of a run's folder.

    Raises:
        RequestError: there is none, or it is not a plan of this version.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RUN_FILE
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RequestError.of(str(path), "there is no such run", "name a run's folder, such as run=runs/NAME") from None
    except (ValueError, yaml.YAMLError) as error:
        raise RequestError.of(
            str(path), f"not a plan that this version understands ({error})", "plan the run anew with `dist-ft plan`"
        ) from error


def _git_sha() -> str | None:
    """The commit of the working directory, with `+` behind it where files differ from it; None outside a checkout."""
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=40", "--dirty=+", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=5,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return run.stdout.strip() or None
