"""The rank of this process, its device, and the environment variables that say so."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass

import torch

from ..errors import MachineError


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


def publish_place(place: Place) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK where no launcher did: DeepSpeed reads them itself."""
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
