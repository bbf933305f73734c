"""Where this process stands among the workers, and the few collectives that are not an engine's own.

The environment is read here and nowhere else in the package (launch/environ.py writes it). torchrun, deepspeed and
`srun` name ranks differently; alone, a process is rank 0 of 1 and needs no launcher.
"""

from __future__ import annotations

import datetime
import os
import socket
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import HashStore, Store

from .errors import MachineError

PREPARATION_LIMIT = datetime.timedelta(days=7)  # tokenising may take long and no collective waits for it


@dataclass(frozen=True)
class Place:
    """One worker among `world_size`."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = "localhost"

    @property
    def is_main(self) -> bool:
        """Whether this rank writes what is written once."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"


def environ(name: str, default: str | None = None) -> str | None:
    """An environment variable; empty counts as not given."""
    return os.environ.get(name) or default


def find_place() -> Place:
    """This worker's place, from its launcher's variables.

    `srun` sets SLURM_PROCID in its tasks; a batch shell has it too, but no SLURM_STEP_ID, and counts as alone.

    Raises:
        MachineError: the variables are incomplete.
    """
    host = socket.gethostname()
    for rank, size, local in (
        ("RANK", "WORLD_SIZE", "LOCAL_RANK"),
        ("SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID"),
    ):
        if rank not in os.environ or (rank == "SLURM_PROCID" and "SLURM_STEP_ID" not in os.environ):
            continue
        missing = [name for name in (size, local, "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if missing and int(os.environ.get(size, "1")) > 1:
            raise MachineError.of(
                rank,
                f"set, but not {', '.join(missing)}",
                "start workers with `dist-ft train`, torchrun, deepspeed, or srun with MASTER_ADDR and MASTER_PORT set",
            )
        return Place(int(os.environ[rank]), int(os.environ.get(size, "1")), int(os.environ.get(local, "0")), host)
    return Place(host=host)


def find_device(place: Place) -> torch.device:
    """The accelerator of this local rank, or the CPU.

    Raises:
        MachineError: the machine has GPUs, but fewer than workers.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # One visible device each is how some schedulers hand out GPUs; the local rank then names no device.
    index = 0 if count == 1 and environ("CUDA_VISIBLE_DEVICES", "") not in (None, "0") else place.local_rank
    if index >= count:
        raise MachineError.of(
            str(place), f"has no GPU of its own: {count} visible", "start at most one worker a GPU (workers_per_node)"
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def open_store(place: Place, timeout_s: float) -> Store:
    """The key-value store that all workers share, before any process group exists.

    Raises:
        MachineError: the first worker cannot be reached, or its port is taken.
    """
    # DeepSpeed reads these itself, also where srun or nobody set them.
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
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
