"""The plan of a run: the configuration and the values derived from it, written once to run.yaml.

Workers read the plan and never compose the configuration themselves, so a job that waits in a queue for days runs
exactly what was submitted.
"""

from __future__ import annotations

import datetime
import os
import re
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

import yaml

from ..errors import MachineError, RequestError
from .run import RunConfig
from .strict import Strict

# Names of the files and folders in a run's folder.
RUN_FILE = "run.yaml"
METRICS_FILE = "metrics.jsonl"
CHECKPOINTS = "checkpoints"
EXPORT = "model"
LOG_DIR = "logs"
FAILURE_FILE = "failure.json"
RECORD_FILE = "record.json"  # what a start found: versions, devices, estimated memory, accounts of the data
REPORT_FILE = "report.html"
TRACKING_FILE = "tracking.json"  # the runs of trackers: where they are, and by which id they go on
STOP_FILE = "stop_requested"  # written by a launcher whose signals do not reach the workers
EXIT_FILE = "exit_code"  # of the last start; missing while it runs, and if it was killed
JOB_FILE = "job.json"  # the id of the SLURM job of the last start
LOCK_FILE = ".lock"
START_FILE = "start.safetensors"  # initial LoRA factors of PiSSA and OLoRA
REFERENCE_FILE = "reference.safetensors"  # log-probabilities under the initial model, one tensor per split
SEED_FILE = "noise_seed"  # noise seed of a private run; readable by its owner only

STEP = re.compile(r"step-[0-9]+")


class Plan(Strict):
    """Content of `run.yaml`."""

    config: RunConfig
    nodes: int
    workers_per_node: int
    world_size: int
    accumulation_steps: int  # gradient accumulation: micro-batches per step on each rank
    git_sha: str | None  # commit of the working directory in which the run was planned
    created: str  # UTC, ISO 8601
    origins: dict[
        str, str
    ]  # dotted key → origin of its value, for keys that the user set, or that were dropped or adapted

    @property
    def run_dir(self) -> Path:
        """Path of the run's folder."""
        return Path(self.config.output_dir)

    @property
    def run_file(self) -> Path:
        """Path of `run.yaml`."""
        return self.run_dir / RUN_FILE


def saved_steps(checkpoints: Path) -> list[Path]:
    """List the folders `step-<n>` of checkpoints, newest first; everything else in the folder is left alone."""
    found = [(int(path.name[5:]), path) for path in checkpoints.glob("step-*") if STEP.fullmatch(path.name)]
    return [path for _, path in sorted(found, reverse=True)]


def make_plan(config: RunConfig, *, nodes: int, workers_per_node: int, origins: Mapping[str, str]) -> Plan:
    """Build the plan for `nodes * workers_per_node` workers, whose micro-batches divide the global batch."""
    world_size = nodes * workers_per_node
    steps, rest = divmod(config.train.global_batch_size, world_size * config.train.per_device_train_batch_size)
    assert rest == 0, "checks/batch.py reports a global batch that is not a multiple of the micro-batches"
    return Plan(
        config=config,
        nodes=nodes,
        workers_per_node=workers_per_node,
        world_size=world_size,
        accumulation_steps=steps,
        git_sha=_git_sha(),
        created=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        origins=dict(origins),
    )


def write_plan(plan: Plan) -> Path:
    """Write `run.yaml` atomically into the run's folder and return its path.

    Raises:
        MachineError: If the folder is not writable or the disk is full.
    """
    text = yaml.safe_dump(plan.model_dump(mode="json"), sort_keys=False, allow_unicode=True)
    try:
        plan.run_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile("w", dir=plan.run_dir, delete=False, encoding="utf-8") as file:
            file.write("# The plan of this run: resolved configuration and derived values. Workers read this file.\n")
            file.write(text)
        os.chmod(file.name, 0o644)
        os.replace(file.name, plan.run_file)
    except OSError as error:
        raise MachineError.of(
            str(plan.run_dir), f"cannot be written: {error}", "free disk space, or set output_dir"
        ) from error
    return plan.run_file


def read_plan(path: str | Path) -> Plan:
    """Read a plan from a `run.yaml` file or from a run's folder.

    Raises:
        RequestError: If the file does not exist or is not a valid plan.
    """
    path = Path(path)
    if path.is_dir():
        path = path / RUN_FILE
    try:
        return Plan.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise RequestError.of(
            str(path), "the run does not exist", "set a run's folder, such as run=runs/NAME"
        ) from None
    except (ValueError, yaml.YAMLError) as error:
        raise RequestError.of(
            str(path),
            f"is not a valid plan for this version ({error})",
            "plan the run again with `dist-ft train` or `submit`",
        ) from error


def _git_sha() -> str | None:
    """Return the commit of the working directory, with a `+` suffix if files differ; None outside a git repository."""
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
