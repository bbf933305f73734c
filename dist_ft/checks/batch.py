"""Batch sizes: those that the user did not set adapt to the number of workers, those that were set are checked.

Adapting the micro-batch changes no result, because the loss of a step does not depend on it. The global batch is
changed only if the workers cannot divide it.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from pathlib import Path

from ..config.plan import CHECKPOINTS, Plan, read_plan
from ..config.run import RunConfig
from ..data.read.rows import read_rows
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem, RequestError

AUTO = "auto"  # first word of the origin of an adapted value
GLOBAL, MICRO, WORKERS = "train.global_batch_size", "train.per_device_train_batch_size", "launch.workers_per_node"
SHIPPED = "conf/"  # beginning of the origins of files that come with the package; their batch sizes are defaults
TOLERANCE = 1 / 8  # change of the global batch that is accepted for a larger micro-batch


def settle_batch(config: RunConfig, origins: Mapping[str, str], world_size: int) -> tuple[RunConfig, dict[str, str]]:
    """Adapt the batch sizes that the user did not set to the number of workers.

    A micro-batch becomes the largest that divides the rows of a worker, at most the default. A global batch is kept if
    the workers can divide it, and otherwise replaced by a near one that they can. If a run is resumed, it is that of
    the run.

    Args:
        config: Composed configuration.
        origins: Origins of the keys that the user set.
        world_size: Number of workers.

    Returns:
        The configuration, and the origins with those of changed values, which begin with `AUTO` and give the reason.
    """
    train, notes = config.train, {}
    size, micro = train.global_batch_size, train.per_device_train_batch_size
    free = not _is_set(MICRO, origins)
    if not _is_set(GLOBAL, origins):
        resumed = _resumed_batch(config)
        if resumed is not None:
            size, why = resumed, f"that of the run in {config.output_dir}"
        else:
            size = _nearest(size, micro, world_size, free=free)
            why = f"{train.global_batch_size} cannot be divided into equal micro-batches of {world_size} workers"
        if size != train.global_batch_size:
            notes[GLOBAL] = f"{AUTO}: {why}"
    if free and size % world_size == 0:
        micro = largest_divisor(size // world_size, micro)
        if micro != train.per_device_train_batch_size:
            rows = f"{size // world_size} row{'s' * (size > world_size)}"
            notes[MICRO] = f"{AUTO}: {train.per_device_train_batch_size} does not divide the {rows} of a worker"
    settled = train.model_copy(update={"global_batch_size": size, "per_device_train_batch_size": micro})
    return config.model_copy(update={"train": settled}), {**origins, **notes}


def batch_problems(config: RunConfig, origins: Mapping[str, str], nodes: int, workers: int) -> list[Problem]:
    """Return a problem if the global batch is not a multiple of the micro-batches of all workers.

    Args:
        config: Configuration with settled batch sizes.
        origins: Origins of the keys.
        nodes: Number of nodes.
        workers: Number of workers on each node.
    """
    train, world_size = config.train, nodes * workers
    if train.global_batch_size % (world_size * train.per_device_train_batch_size) == 0:
        return []
    rule = f"{train.global_batch_size} rows per step cannot be divided into micro-batches of "
    rule += f"{train.per_device_train_batch_size} rows on {world_size} workers"
    if not _is_set(MICRO, origins):
        rule = f"{train.global_batch_size} rows per step cannot be divided equally among {world_size} workers"
    most = _rows_at_most(config, train.global_batch_size + world_size * train.per_device_train_batch_size)
    if _resumed_batch(config) == train.global_batch_size:
        way_out = _fewer_workers(config, origins, nodes, workers)
    else:
        way_out = _advice(config, origins, nodes, workers, most)
        small_enough = most is None or train.global_batch_size <= most
        if train.global_batch_size % world_size == 0 and small_enough:
            fits = largest_divisor(train.global_batch_size // world_size, train.per_device_train_batch_size)
            way_out = f"set {MICRO}={fits}, or {way_out}"
    return [Problem(GLOBAL, rule, way_out)]


def samples_problems(plan: Plan, samples: int, kind: str) -> list[Problem]:
    """Return a problem if the prepared training data has fewer samples than a global batch.

    Args:
        plan: Plan of the run.
        samples: Number of training samples.
        kind: What a sample is, in the plural.
    """
    size = plan.config.train.global_batch_size
    if samples >= size:
        return []
    key = "data.mixture" if plan.config.data.mixture is not None else "data.train"
    rule = f"a global batch needs {size} {kind}, but {key} has only {samples}"
    return [Problem(GLOBAL, rule, _advice(plan.config, plan.origins, plan.nodes, plan.workers_per_node, samples))]


def largest_divisor(number: int, limit: int) -> int:
    """Return the largest divisor of `number` that is at most `limit`."""
    return next(divisor for divisor in range(min(number, limit), 0, -1) if number % divisor == 0)


def _is_set(key: str, origins: Mapping[str, str]) -> bool:
    return key in origins and not origins[key].startswith((SHIPPED, AUTO))


def _multiple(size: int, unit: int) -> int:
    """Return the multiple of `unit` that is nearest to `size`, at least one."""
    return max(1, (size + unit // 2) // unit) * unit


def _nearest(size: int, micro: int, world_size: int, *, free: bool) -> int:
    """Return the global batch nearest to `size` that the workers can divide.

    Args:
        size: Default global batch.
        micro: Micro-batch: the default, or the one that the user set.
        world_size: Number of workers.
        free: Whether the micro-batch may become smaller. Then the largest one is chosen whose multiple is within
            `TOLERANCE` of `size`, because a worker is slow if its micro-batches are small.
    """
    if not free:
        return _multiple(size, world_size * micro)
    if size % world_size == 0:
        return size
    candidates = [_multiple(size, world_size * rows) for rows in range(micro, 0, -1)]
    return next((found for found in candidates if abs(found - size) <= TOLERANCE * size), candidates[-1])


def _advice(config: RunConfig, origins: Mapping[str, str], nodes: int, workers: int, most: int | None) -> str:
    """Return which values to set so that all rules of batch sizes are met at once.

    Args:
        config: Configuration of the run.
        origins: Origins of the keys.
        nodes: Number of nodes.
        workers: Number of workers on each node.
        most: Number of training samples; None if it is not known, or large enough.
    """
    train, values = config.train, {}
    if most is not None and nodes * workers > most:
        workers = most // nodes
        if workers == 0:
            return f"add rows, or use at most {most} nodes"
        values[WORKERS] = workers
    world_size, micro = nodes * workers, train.per_device_train_batch_size
    unit = world_size * micro if _is_set(MICRO, origins) else world_size
    if most is not None and unit > most:
        unit = world_size
    size = _multiple(train.global_batch_size, unit)
    size = size if most is None else min(size, most // unit * unit)
    values[GLOBAL] = size
    if _is_set(MICRO, origins) and size % (world_size * micro):
        values[MICRO] = largest_divisor(size // world_size, micro)
    return "set " + " and ".join(f"{key}={value}" for key, value in values.items())


def _fewer_workers(config: RunConfig, origins: Mapping[str, str], nodes: int, workers: int) -> str:
    """Return how many workers can resume a run whose global batch must not change."""
    size, micro = config.train.global_batch_size, config.train.per_device_train_batch_size
    unit = nodes * micro if _is_set(MICRO, origins) else nodes
    fits = [count for count in range(workers, 0, -1) if size % (count * unit) == 0]
    way_out = "set run_name to a new name"
    return f"set {WORKERS}={fits[0]}, or {way_out} for a separate run" if fits else f"{way_out}, or use fewer nodes"


def _resumed_batch(config: RunConfig) -> int | None:
    """Return the global batch of the run that is resumed in the folder of the run; None if there is none."""
    folder = Path(config.output_dir)
    if not any(folder.glob(f"{CHECKPOINTS}/step-*")):
        return None
    try:
        return read_plan(folder).config.train.global_batch_size
    except RequestError:  # reported by the checks of the folder
        return None


def _rows_at_most(config: RunConfig, limit: int) -> int | None:
    """Return the number of training rows, if it limits the number of samples and is below `limit`; None otherwise."""
    data = config.data
    several = config.task.packs or config.task.name == "question_answering" or data.augment is not None
    if several or not data.train:
        return None
    try:
        if any(isinstance(file, HubSet) for file in resolve(data.train)):
            return None
        rows = read_rows(data.train, delimiter=data.delimiter, sample_by=data.sample_by)
        count = sum(1 for _ in itertools.islice(rows, limit))
    except DistFtError:  # reported by the checks of the data
        return None
    return count if count < limit else None
