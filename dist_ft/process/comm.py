"""The store and process group of the workers, and the few collectives that engines do not provide.

Without a process group, the collectives behave as with a single rank.
"""

from __future__ import annotations

import datetime
import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store

from ..errors import DistFtError, MachineError
from .place import Place, check_devices, environ, name_device, publish_place

# How long ranks wait for another rank that prepares data, loads or exports. It is not meant to detect a rank that
# hangs: the watchdog does, because it knows whether any rank makes progress.
WAITING_LIMIT = datetime.timedelta(days=7)
MAIL_LIMIT_S = 600  # of a call on the connection of a mailbox, none of which waits


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


def connect_again(store: Store, timeout_s: float) -> Store:
    """Open another connection to the store, since a waiting call blocks all other calls on its connection.

    Args:
        store: The store of the workers.
        timeout_s: Limit of each call on the new connection.
    """
    clone: Store = store.clone()  # type: ignore[attr-defined]  # torch's stubs lack it
    clone.set_timeout(datetime.timedelta(seconds=timeout_s))
    return clone


def join(place: Place, store: Store, device: torch.device, timeout_s: float | None = None) -> None:
    """Initialize the default process group (gloo; NCCL for CUDA tensors).

    Waits up to `WAITING_LIMIT` for ranks that are still preparing data.

    Args:
        place: Place of this rank.
        store: The store of the workers.
        device: Device of this rank.
        timeout_s: Limit of a collective, for processes without a watchdog; `WAITING_LIMIT` if None.

    Raises:
        MachineError: If two ranks have the same GPU, or only some ranks have one.
    """
    limit = WAITING_LIMIT if timeout_s is None else datetime.timedelta(seconds=timeout_s)
    ready = [f"ready/{rank}" for rank in range(place.world_size)]
    store.set(ready[place.rank], json.dumps([place.host, name_device(device)]))
    store.wait(ready, WAITING_LIMIT)
    check_devices([tuple(json.loads(value)) for value in store.multi_get(ready)])
    store.set_timeout(limit)  # ranks that set up a communicator wait for each other here
    dist.init_process_group(
        "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
        store=store,
        rank=place.rank,
        world_size=place.world_size,
        timeout=limit,
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


def send(tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Copy a tensor of the CPU to a device; the host does not wait, for which the memory must be page-locked."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


class Agreement:
    """Agreement of all ranks on the call at which they stop, without waiting for each other.

    What the ranks say in one call is reduced while they work, and read in the next call. Every rank must make the same
    number of calls.
    """

    def __init__(self) -> None:
        self._said = torch.zeros(1)
        self._work: dist.Work | None = None

    def reached(self, wanted: bool) -> bool:
        """Return whether any rank wanted to stop in the previous call; `wanted` is what this rank wants now."""
        if self._work is not None:
            self._work.wait()
        found = bool(self._said)
        self._said = torch.tensor([float(wanted)])
        if dist.is_initialized() and dist.get_world_size() > 1:
            self._work = dist.all_reduce(self._said, async_op=True)
        return found


class Exchange:
    """Numbers of all ranks, which are exchanged while they work.

    Every rank must call `post` with as many numbers, and `take` afterwards, at the same places.
    """

    def __init__(self) -> None:
        self._numbers: torch.Tensor | None = None
        self._work: dist.Work | None = None

    def post(self, numbers: Sequence[float]) -> None:
        """Begin to send this rank's numbers to the others."""
        rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
        self._numbers = torch.zeros(world, len(numbers), dtype=torch.float64)
        self._numbers[rank] = torch.tensor(numbers, dtype=torch.float64)
        if world > 1:
            self._work = dist.all_reduce(self._numbers, async_op=True)

    def take(self) -> list[list[float]] | None:
        """Return the numbers of each rank in rank order, once; None if none were posted since the last call."""
        if self._numbers is None:
            return None
        if self._work is not None:
            self._work.wait()
        found, self._numbers, self._work = self._numbers.tolist(), None, None
        return found


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


def share_of(items: Sequence[Any]) -> Sequence[Any]:
    """Return this rank's share of items that every rank lists alike."""
    if not dist.is_initialized():
        return items
    return items[dist.get_rank() :: dist.get_world_size()]


def open_mailbox() -> Store:
    """Open another connection to the store of the process group, for a thread that must not wait for a collective."""
    return connect_again(dist.distributed_c10d._get_default_store(), MAIL_LIMIT_S)


def on_main(find: Callable[[], Any]) -> Any:
    """Call `find` on rank 0; return what it returns on every rank, or raise the error that it raises on every rank."""
    found: Any = None
    if not dist.is_initialized() or dist.get_rank() == 0:
        try:
            found = find()
        except DistFtError as error:
            found = error
    found = from_main(found)
    if isinstance(found, DistFtError):
        raise found
    return found


def from_main(value: Any) -> Any:
    """Broadcast a small Python object from rank 0."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]
