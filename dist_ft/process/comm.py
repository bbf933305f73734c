"""The store and process group of the workers, and the few collectives that engines do not provide.

Without a process group, the collectives behave as with a single rank.
"""

from __future__ import annotations

import datetime
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store

from ..errors import MachineError
from .place import Place, environ, publish_place

PREPARATION_LIMIT = datetime.timedelta(days=7)  # tokenization may take long, and no collective waits for it


def open_store(place: Place, timeout_s: float) -> Store:
    """Open the key-value store that all workers share, before the process group is initialized.

    Raises:
        MachineError: If the first worker cannot be reached or its port is in use.
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
            f"{place} could not join the rendezvous: {reason}",
            "check that the first host is up, that its address is on the network of the workers, and the port is free",
        ) from error
    return store


def connect_again(store: Store) -> Store:
    """Open another connection to the store, since a waiting call blocks all other calls on its connection."""
    clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    return clone


def join(place: Place, store: Store, device: torch.device, timeout_s: float) -> None:
    """Initialize the default process group (gloo; NCCL for CUDA tensors).

    Waits up to `PREPARATION_LIMIT` for ranks that are still preparing data; `timeout_s` applies to later collectives.
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
    """Destroy the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def total(value: torch.Tensor) -> torch.Tensor:
    """All-reduce (sum) a tensor of any shape over all ranks, in place, and return it."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.all_reduce(value)
    return value


def barrier() -> None:
    """Wait until every rank reaches this call."""
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.barrier()


def gather(value: Any) -> list[Any]:
    """All-gather small Python objects, in rank order."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any) -> Any:
    """Broadcast a small Python object from rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
