"""The machine and the environment as launchers see them; the only place of `launch` that reads `os.environ`.

Workers inherit this process's environment where they are its children. Where they are not (another host, a job), only
what is named here reaches them, and secrets do not: a file or a command line would show them to others.
"""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field

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
# Set for one process by whoever started this one; a worker elsewhere that had them would take itself for another.
PER_PROCESS = ("HF_TOKEN_PATH", "TORCHELASTIC_", "TORCH_NCCL_TRACE")

# What marks a worker; a launcher inside a job's shell starts a group of its own.
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
    """What rendering needs to know of the machine where the user types; given as a value so that rendering is pure."""

    python: str
    cwd: str
    cores: int
    devices: tuple[int, ...] = ()  # ids of the GPUs that workers may use here
    environment: Mapping[str, str] = field(default_factory=dict)  # for workers elsewhere, without secrets

    def threads(self, workers: int) -> int:
        """Threads of each of `workers` processes on this machine: its cores shared out, at least one."""
        return max(1, self.cores // workers)


def find_site(environ: Mapping[str, str] | None = None) -> Site:
    """This machine, without importing torch (2.4 s)."""
    environ = os.environ if environ is None else environ
    return Site(
        python=sys.executable,
        cwd=os.getcwd(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        devices=find_devices(environ),
        environment=shared_environment(environ),
    )


def find_devices(environ: Mapping[str, str]) -> tuple[int, ...]:
    """Ids of the visible GPUs: those of CUDA_VISIBLE_DEVICES, or all that nvidia-smi lists.

    A name (`GPU-…`, `MIG-…`) in CUDA_VISIBLE_DEVICES counts by its place, as CUDA numbers what is visible from 0.
    """
    listed = _listed_devices()
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return tuple(range(listed))
    words = [word.strip() for word in visible.split(",") if word.strip()]
    if "-1" in words:  # CUDA ignores what follows
        words = words[: words.index("-1")]
    if not listed:
        return ()  # ids of devices that are not there: left over from a job, or a CPU machine made to look like one
    return tuple(int(word) if word.isdigit() else place for place, word in enumerate(words))


def _listed_devices() -> int:
    if shutil.which("nvidia-smi") is None:
        return 0
    try:
        run = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return 0
    return sum(line.startswith("GPU ") for line in run.stdout.splitlines()) if run.returncode == 0 else 0


def is_secret(name: str) -> bool:
    """Whether a variable of this name holds what nobody else may read."""
    return SECRET.search(name) is not None


def shared_environment(environ: Mapping[str, str]) -> dict[str, str]:
    """The variables that workers on other machines need too, sorted; neither secrets nor anything of several lines."""
    found = {}
    for name, value in sorted(environ.items()):
        wanted = name in NAMES or name.startswith(PREFIXES)
        if wanted and not is_secret(name) and not name.startswith(PER_PROCESS) and value.isprintable():
            found[name] = value
    return found


def child_environment(extra: Mapping[str, str]) -> dict[str, str]:
    """This process's environment with `extra` and without what marks a worker, for a child."""
    own = {name: value for name, value in os.environ.items() if name not in WORKER_MARKS}
    return {**own, **extra}


def export_lines(environment: Mapping[str, str]) -> list[str]:
    """`export NAME=VALUE` lines of a shell script."""
    return [f"export {name}={shlex.quote(value)}" for name, value in environment.items()]
