"""Rank and device of this process, from the environment variables of its launcher.

torchrun, deepspeed and `srun` name ranks differently; without a launcher, a process is rank 0 of 1.
"""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass
from typing import TextIO

import torch

from ..errors import MachineError
from ..state import Beat


@dataclass(frozen=True)
class Place:
    """Rank of one worker among `world_size` workers."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    host: str = "localhost"

    @property
    def is_main(self) -> bool:
        """Whether this is rank 0, which writes the files of the run."""
        return self.rank == 0

    def __str__(self) -> str:
        return f"rank {self.rank} of {self.world_size} on {self.host}"


@dataclass(frozen=True)
class Worker:
    """This process as one worker of a run, with its place, device, terminal and watchdog."""

    place: Place
    device: torch.device
    terminal: TextIO  # where rank 0 shows progress
    beat: Beat

    def say(self, line: str) -> None:
        """Print a line for the user, only on rank 0."""
        if self.place.is_main:
            print(f"dist-ft: {line}", file=self.terminal, flush=True)


def environ(name: str, default: str | None = None) -> str | None:
    """Return an environment variable, or `default` if it is empty or not set."""
    return os.environ.get(name) or default


def find_place() -> Place:
    """Return the place of this worker from the variables of its launcher.

    `srun` sets SLURM_PROCID in its tasks. A batch shell has it too, but without SLURM_STEP_ID, and counts as a single
    process.

    Raises:
        MachineError: If some of the variables are not set.
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
                f"is set, but not {', '.join(missing)}",
                "start workers with `dist-ft train`, torchrun, deepspeed, or srun with MASTER_ADDR and MASTER_PORT set",
            )
        return Place(int(os.environ[rank]), int(os.environ.get(size, "1")), int(os.environ.get(local, "0")), host)
    return Place(host=host)


def find_device(place: Place) -> torch.device:
    """Return the GPU of this local rank, or the CPU on a machine without GPUs.

    Raises:
        MachineError: If the machine has fewer GPUs than workers.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    count = torch.cuda.device_count()
    # Some schedulers make only one GPU visible to each worker; the local rank is then not its index.
    index = 0 if count == 1 and environ("CUDA_VISIBLE_DEVICES", "") not in (None, "0") else place.local_rank
    if index >= count:
        raise MachineError.of(
            str(place),
            f"no GPU is left for this rank, visible GPUs: {count}",
            "set launch.workers_per_node to at most the number of GPUs",
        )
    torch.cuda.set_device(index)
    return torch.device("cuda", index)


def publish_place(place: Place) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK if they are not set, since DeepSpeed reads them."""
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
