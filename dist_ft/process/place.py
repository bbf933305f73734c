"""Rank and device of this process, from the environment variables of its launcher.

torchrun, deepspeed and `srun` name ranks differently; without a launcher, a process is rank 0 of 1.

Imports torch only to find a device, so that a worker knows its rank before that takes seconds.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TextIO

from ..errors import MachineError
from ..state import Beat, unwatched
from .stop import Stop

if TYPE_CHECKING:
    import torch


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


@dataclass
class Above:
    """Where lines are shown while a progress bar is on the terminal: above it. None without a bar."""

    show: Callable[[str], object] | None = None


@dataclass(frozen=True)
class Worker:
    """This process as one worker of a run, with its place, device, terminal and watchdog."""

    place: Place
    device: torch.device
    terminal: TextIO  # where rank 0 shows progress
    beat: Beat  # a phase, step or micro-batch that every rank reaches
    tick: Beat = unwatched  # progress inside a phase, such as a tensor written, which other ranks may not make
    stop: Stop = field(default_factory=Stop)
    above: Above = field(default_factory=Above)

    def say(self, line: str) -> None:
        """Print a line for the user, only on rank 0."""
        if not self.place.is_main:
            return
        if self.above.show is not None:
            self.above.show(f"dist-ft: {line}")
        else:
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


def time_limit() -> float | None:
    """Return the Unix time at which SLURM ends this job; None if it is not known."""
    end = environ("SLURM_JOB_END_TIME", "")
    return float(end) if end and end.isdigit() and int(end) > 0 else None


def find_device(place: Place) -> torch.device:
    """Return the GPU of this local rank, or the CPU on a machine without GPUs.

    A launcher may make all GPUs of the machine visible to each worker, or only the worker's own, renumbered from 0. The
    environment does not show which (with `srun --gpus-per-task=1`, CUDA_VISIBLE_DEVICES can be 0 in every task).
    Therefore, the index is the local rank modulo the number of visible GPUs, and `check_devices` checks that no two
    ranks use the same GPU.
    """
    import torch

    if not torch.cuda.is_available():
        return torch.device("cpu")
    index = place.local_rank % torch.cuda.device_count()
    torch.cuda.set_device(index)
    if place.world_size > 1:
        os.environ["LOCAL_RANK"] = str(index)  # DeepSpeed uses the GPU with this index
    return torch.device("cuda", index)


def name_device(device: torch.device) -> str:
    """Return the model, UUID and PCI address of a GPU, which no other GPU of the machine has; or `cpu`."""
    if device.type != "cuda":
        return device.type
    import torch

    of = torch.cuda.get_device_properties(device)
    # MIG instances share the address of their GPU, and some AMD GPUs have no UUID of their own.
    address = ":".join(f"{getattr(of, f'pci_{part}_id', 0):02x}" for part in ("domain", "bus", "device"))
    return f"{of.name} ({of.uuid}, {address})"


def check_devices(found: Sequence[tuple[str, str]]) -> None:
    """Check that all ranks have a GPU of their own, or that all use the CPU.

    Args:
        found: Host of each rank and the name of its device, in rank order.

    Raises:
        MachineError: If two ranks have the same GPU, or only some ranks have one.
    """
    bare = [rank for rank, (_, name) in enumerate(found) if name == "cpu"]
    if 0 < len(bare) < len(found):
        where = f"rank {bare[0]} on {found[bare[0]][0]}"
        rule = "finds no GPU, but other ranks do"
        raise MachineError.of(where, rule, "run `dist-ft doctor` on that host, or hide the GPUs of all ranks")
    taken: dict[tuple[str, str], int] = {}
    for rank, (host, name) in enumerate(found):
        if name != "cpu" and (first := taken.setdefault((host, name), rank)) != rank:
            rule = f"both compute on the same GPU, {name}"
            way_out = (
                "set launch.workers_per_node to at most the number of GPUs; on SLURM, request as many GPUs as tasks on"
                " each node (launch.gpus_per_node)"
            )
            raise MachineError.of(f"ranks {first} and {rank} on {host}", rule, way_out)


def publish_place(place: Place) -> None:
    """Set RANK, WORLD_SIZE and LOCAL_RANK if they are not set, since DeepSpeed reads them."""
    os.environ.setdefault("RANK", str(place.rank))
    os.environ.setdefault("WORLD_SIZE", str(place.world_size))
    os.environ.setdefault("LOCAL_RANK", str(place.local_rank))
