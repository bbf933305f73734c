"""What SLURM says: the GPUs of a partition, and the state of jobs; and how jobs are cancelled."""

from __future__ import annotations

import re
import shutil
import subprocess
from dataclasses import dataclass

from ...errors import MachineError
from ..machine.environ import child_environment

LIMIT_S = 30.0
QUEUED = ("PENDING", "REQUEUED", "REQUEUE_HOLD", "SUSPENDED", "CONFIGURING")
ACTIVE = (*QUEUED, "RUNNING", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT")


@dataclass(frozen=True)
class SlurmJob:
    """What SLURM says of a job."""

    state: str
    reason: str = ""
    nodes: str = ""
    restarts: int = 0

    @property
    def is_active(self) -> bool:
        """Whether the job is queued or runs."""
        return self.state in ACTIVE

    @property
    def said(self) -> str:
        """The state in words."""
        words = [self.state.lower()]
        words += [self.reason] if self.state in QUEUED and self.reason not in ("", "None") else []
        words += [f"on {self.nodes}"] if self.nodes and self.state not in QUEUED else []
        words += [f"restart {self.restarts}"] if self.restarts else []
        return ", ".join(words)


def find_job(identity: str) -> SlurmJob | None:
    """Return what SLURM says of a job; None if it does not know the job any more, or does not answer.

    `scontrol` knows jobs for a few minutes after their end (`MinJobAge`), and `sacct` where accounting is set up.
    """
    if shown := _call("scontrol", "--oneliner", "show", "job", identity):
        found = dict(re.findall(r"(JobState|Reason|NodeList|Restarts)=(\S*)", f" {shown}"))
        nodes = found.get("NodeList", "").replace("(null)", "")
        restarts = int(found.get("Restarts", "0"))
        return SlurmJob(found.get("JobState", "UNKNOWN"), found.get("Reason", ""), nodes, restarts)
    if shown := _call("sacct", "--allocations", "--noheader", "--parsable2", "--format=State", f"--jobs={identity}"):
        return SlurmJob(shown.split()[0])
    return None


def has_gpus(partition: str | None) -> bool | None:
    """Return whether a node of a partition (by default, of any) has GPUs; None if SLURM does not say."""
    words = ["sinfo", "--noheader", "--format=%G", *([f"--partition={partition}"] if partition else [])]
    kinds = _call(*words).split()
    return any(kind.startswith("gpu") for kind in kinds) if kinds else None


def cancel_job(identity: str, *, only_restarts: bool = False) -> None:
    """Cancel a job, or only prevent that it starts again.

    Raises:
        MachineError: If the programs of SLURM are missing, or SLURM refuses.
    """
    words = ["scontrol", "update", f"JobId={identity}", "Requeue=0"] if only_restarts else ["scancel", identity]
    if shutil.which(words[0]) is None:
        raise MachineError.of(f"job {identity}", f"{words[0]} is not installed here", "run this on a login node")
    run = subprocess.run(words, capture_output=True, text=True, timeout=LIMIT_S, env=child_environment({}), check=False)
    if run.returncode:
        raise MachineError.of(f"job {identity}", f"SLURM says: {run.stderr.strip()}", f"see `squeue --job {identity}`")


def _call(*words: str) -> str:
    """Return the output of a program of SLURM; empty if it fails or is not installed."""
    try:
        run = subprocess.run(
            words, capture_output=True, text=True, timeout=LIMIT_S, env=child_environment({}), check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return run.stdout.strip() if run.returncode == 0 else ""
