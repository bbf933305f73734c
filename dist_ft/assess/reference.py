"""Reference log-probabilities of the initial model, computed once and stored, for tasks that compare with it.

The run's own engine computes them before a checkpoint is loaded, so that no second model is kept in memory and the
reference is correct for every method: it is the model at the start of training, including adapters. A resumed run reads
the stored values and therefore has the same loss curve as an uninterrupted run.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file, save_file

from ..config.plan import REFERENCE_FILE, Plan
from ..data.order.loader import evaluation_batches
from ..data.store.opened import Split
from ..loop import evaluate
from ..prepare import Prepared
from ..process import comm
from ..process.place import Worker
from ..protocols import Engine, Refers, Task
from ..state import Prediction


def refer_to_start(
    plan: Plan,
    prepared: Prepared,
    task: Task,
    engine: Engine,
    worker: Worker,
) -> Prepared:
    """Add the reference log-probabilities of the initial model to the data; collective over all ranks.

    Args:
        plan: plan of the run; the values are stored in its folder.
        prepared: prepared data of the run.
        task: task of the run; the data is returned unchanged if it needs no reference.
        engine: engine with the initial model.
        worker: this worker.
    """
    if not isinstance(task, Refers):
        return prepared
    place, path = worker.place, plan.run_dir / REFERENCE_FILE
    held: dict[str, np.ndarray] = comm.from_main(read_references(path) if place.is_main else None)
    splits = {name: split for name in ("train", "validation") if (split := getattr(prepared, name)) is not None}
    missing = {name_of(split): split for split in splits.values() if name_of(split) not in held}
    for name, split in missing.items():
        worker.say(f"computing reference log-probabilities of {split.ledger['samples']:,} samples")
        batches = evaluation_batches(
            split.open_table(),
            split.open_samples(),
            task.collate,
            rank=place.rank,
            world=place.world_size,
            per_device=plan.config.train.per_device_eval_batch_size,
        )
        held[name] = values_of(evaluate(engine, batches, task.refer, worker.beat).predictions)
    if missing and place.is_main:
        write_references(path, held)
    return replace(prepared, **{name: replace(split, reference=held[name_of(split)]) for name, split in splits.items()})


def name_of(split: Split) -> str:
    """Return the name of the split's data folder, which is a hash of its content."""
    return Path(split.table).name


def values_of(predictions: Iterable[Prediction]) -> np.ndarray:
    """Return log-probabilities `[samples, sequences]`, float64, from predictions in sample order."""
    return np.array([prediction["values"] for prediction in predictions], dtype=np.float64)


def read_references(path: Path) -> dict[str, np.ndarray]:
    """Read the stored log-probabilities by name of the split; empty if the file does not exist."""
    return dict(load_file(path)) if path.exists() else {}


def write_references(path: Path, references: Mapping[str, np.ndarray]) -> None:
    """Write the log-probabilities atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.partial")
    save_file(dict(references), staging)
    with staging.open("rb") as file:
        os.fsync(file.fileno())
    staging.replace(path)
