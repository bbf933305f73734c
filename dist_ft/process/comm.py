"""Where this process stands among the workers, and the few collectives that are not an engine's own.

The environment is read here and nowhere else in the package (launch/environ.py writes it). torchrun, deepspeed and
`srun` name ranks differently; alone, a process is rank 0 of 1 and needs no launcher.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store

from ..errors import MachineError
from .place import Place, environ, publish_place

PREPARATION_LIMIT = datetime.timedelta(days=7)  # tokenising may take long and no collective waits for it


def open_store(place: Place, timeout_s: float) -> Store:
    """The key-value store that all workers share, before any process group exists.

    Raises:
        MachineError: the first worker cannot be reached, or its port is taken.
    """
    publish_place(place)
    if place.world_size == 1:
        return HashStore()
    where = f"{environ('MASTER_ADDR')}:{environ('MASTER_PORT')}"
    try:
        timeout = datetime.timedelta(seconds=timeout_s)
        store, _, _ = next(dist.rendezvous("env://", place.rank, place.world_size, timeout=timeout))
    except (RuntimeError, ValueError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise MachineError.of(
            where,
            f"{place} found no rendezvous there: {reason}",
            "see that the first host is up, that its address is the one on the workers' network, and the port is free",
        ) from error
    return store


def connect_again(store: Store) -> Store:
    """A connection of its own to the same store: a call that waits blocks all others on its connection."""
    clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    return clone


def join(place: Place, store: Store, device: torch.device, timeout_s: float) -> None:
    """Form the default process group (gloo; NCCL for tensors on GPUs).

    Waits for ranks that still prepare data as long as they need; only then does a time-out begin to count.
    """
    store.set(f"ready/{place.rank}", place.host)
    store.wait([f"ready/{rank}" for rank in range(place.world_size)], PREPARATION_LIMIT)
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=datetime.timedelta(seconds=timeout_s),
    )


def leave() -> None:
    """End the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(value: torch.Tensor) -> torch.Tensor:
    """Sum over all ranks, in place; any shape, returned for convenience."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait for every rank."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """Every rank's small Python object, in rank order, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Rank 0's small Python object, on every rank."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
