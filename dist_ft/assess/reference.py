"""The model as it starts, as the reference of tasks that compare with it: its log-probabilities, taken once and kept.

They are taken by the run's own engine before a checkpoint is read, so that there is no second model in memory and
every method is right: the reference is the model that training departs from, adapters and all. A run that goes on reads
what it kept, and has the curve of one that was never stopped.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TextIO

import numpy as np
from safetensors.numpy import load_file, save_file

from ..config.plan import REFERENCE_FILE, Plan
from ..data.order.loader import evaluation_batches
from ..data.store.opened import Split
from ..loop import evaluate
from ..prepare import Prepared
from ..process import comm
from ..process.place import Place
from ..state import Engine, Prediction, Refers, Task


def refer_to_start(
    plan: Plan,
    prepared: Prepared,
    task: Task,
    engine: Engine,
    place: Place,
    terminal: TextIO,
    beat: Callable[[str], None],
) -> Prepared:
    """The data with what the model says of them before it learns; every rank takes part.

    Args:
        plan: of the run, in whose folder it is kept.
        prepared: the run's data.
        task: what is to be learned; data of one that refers to no start stay as they are.
        engine: with the model as it was built.
        place: this rank.
        terminal: is told where it takes a while.
        beat: tells a watchdog how far this rank has come.
    """
    if not isinstance(task, Refers):
        return prepared
    path = plan.run_dir / REFERENCE_FILE
    held: dict[str, np.ndarray] = comm.from_main(read_references(path) if place.is_main else None)
    splits = {name: split for name in ("train", "validation") if (split := getattr(prepared, name)) is not None}
    missing = {name_of(split): split for split in splits.values() if name_of(split) not in held}
    for name, split in missing.items():
        if place.is_main:
            samples = split.ledger["samples"]
            print(
                f"dist-ft: the model as it starts is asked about {samples:,} samples, once", file=terminal, flush=True
            )
        batches = evaluation_batches(
            split.open_table(),
            split.open_samples(),
            task.collate,
            rank=place.rank,
            world=place.world_size,
            per_device=plan.config.train.per_device_eval_batch_size,
        )
        held[name] = values_of(evaluate(engine, batches, task.refer, beat).predictions)
    if missing and place.is_main:
        write_references(path, held)
    return replace(prepared, **{name: replace(split, reference=held[name_of(split)]) for name, split in splits.items()})


def name_of(split: Split) -> str:
    """What tells the split's tokens from all others: the hash that their folder is named by."""
    return Path(split.table).name


def values_of(predictions: Iterable[Prediction]) -> np.ndarray:
    """[samples, sequences] float64, from predictions in the samples' order."""
    return np.array([prediction["values"] for prediction in predictions], dtype=np.float64)


def read_references(path: Path) -> dict[str, np.ndarray]:
    """What is kept, by the name of the split; nothing where there is no file."""
    return dict(load_file(path)) if path.exists() else {}


def write_references(path: Path, references: Mapping[str, np.ndarray]) -> None:
    """Whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    save_file(dict(references), staging)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    staging.replace(path)
