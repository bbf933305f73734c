"""Machine and environment of the launchers; the only module of `launch` that reads `os.environ`.

Workers that are child processes inherit the environment. Workers on other hosts receive only the variables listed
here, and never secrets, because files and command lines can be read by other users.
"""

from __future__ import annotations

import os
import re
import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

from .devices import find_devices, has_old_gpus

SECRET = re.compile(r"(TOKEN|KEY|SECRET|PASSWORD|PASSWD|CREDENTIAL)S?($|_)", re.IGNORECASE)
PREFIXES = (
    "PYTHON",
    "MLFLOW_",
    "MV2_",
    "NCCL_",
    "GLOO_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "HF_",
    "WANDB_",
    "TRITON_",
    "OMP_",
    "MKL_",
    "KMP_",
    "UCX_",
)
NAMES = (
    "LD_LIBRARY_PATH",
    "CUDA_HOME",
    "DS_ACCELERATOR",
    "HF_HOME",
    "XDG_CACHE_HOME",
    "TOKENIZERS_PARALLELISM",
    "PYTORCH_CUDA_ALLOC_CONF",
    "PYTORCH_ALLOC_CONF",
)
# These variables describe a single process, so they must not be passed on to other workers.
PER_PROCESS = ("HF_TOKEN_PATH", "TORCHELASTIC_", "TORCH_NCCL_TRACE")

# These variables identify a worker; a launcher that itself runs inside a job must not pass them to its workers.
WORKER_MARKS = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "LOCAL_WORLD_SIZE",
    "GROUP_RANK",
    "MASTER_ADDR",
    "MASTER_PORT",
    "SLURM_PROCID",
    "SLURM_LOCALID",
    "SLURM_NTASKS",
)


@dataclass(frozen=True)
class Site:
    """Properties of the submitting machine that rendering needs; passed as a value so that rendering stays pure."""

    python: str
    cwd: str
    cores: int
    devices: tuple[int | str, ...] = ()  # GPUs visible to workers on this machine, as CUDA_VISIBLE_DEVICES names them
    old_gpus: bool = False  # whether a GPU of this machine does not compute in bfloat16
    environment: Mapping[str, str] = field(default_factory=dict)  # for workers on other machines, without secrets

    @property
    def has_bfloat16(self) -> bool:
        """Return whether workers on this machine have GPUs that compute in bfloat16."""
        return bool(self.devices) and not self.old_gpus

    def threads(self, workers: int) -> int:
        """Return the number of threads for each of `workers` processes on this machine, at least 1."""
        return max(1, self.cores // workers)


def find_site(environ: Mapping[str, str] | None = None) -> Site:
    """Describe this machine, without importing torch, which takes 2.4 s."""
    environ = os.environ if environ is None else environ
    return Site(
        python=sys.executable,
        cwd=os.getcwd(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        devices=find_devices(environ),
        old_gpus=has_old_gpus(),
        environment=shared_environment(environ),
    )


def is_secret(name: str) -> bool:
    """Return whether a variable with this name holds a secret."""
    return SECRET.search(name) is not None


def shared_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """Return the variables to pass to workers on other machines, sorted, without secrets and multi-line values."""
    found = {}
    for name, value in sorted(environ.items()):
        wanted = name in NAMES or name.startswith(PREFIXES)
        if wanted and not is_secret(name) and not name.startswith(PER_PROCESS) and value.isprintable():
            found[name] = value
    return found


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """Return the environment for a child process: this one's without the variables of a worker, plus `extra`."""
    own = {name: value for name, value in os.environ.items() if name not in WORKER_MARKS}
    return {**own, **extra}


def export_lines(environment: Mapping[str, str]) -> list[str]:
    """Return the `export NAME=VALUE` lines of a shell script."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]


def variable(name: str) -> str | None:
    """Return an environment variable, or None if it is empty or not set."""
    return os.environ.get(name) or None


def is_completing() -> bool:
    """Return whether a shell asks for completions (argcomplete's protocol) instead of running a command."""
    return "_ARGCOMPLETE" in os.environ
