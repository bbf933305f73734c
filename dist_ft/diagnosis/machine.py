"""Checks of programs, disk space, shared memory and resource limits."""

from __future__ import annotations

import os
import resource
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

from ..process.place import environ
from .finding import Finding, note, ok, problem

LEAST_ROOM = 1 << 30
USUAL_ROOM = 20 << 30
LEAST_SHARED_MEMORY = 64 << 20
USUAL_SHARED_MEMORY = 1 << 30
LEAST_FILES = 256
USUAL_FILES = 4096


def check_programs() -> Iterator[Finding]:
    """Check for the programs that start runs on other machines."""
    for name, use in (
        ("ssh", "launch=deepspeed"),
        ("pdsh", "launch=deepspeed over many hosts"),
        ("sbatch", "launch=slurm"),
    ):
        found = shutil.which(name)
        yield ok(name, found) if found else note(name, f"not on PATH; only required for {use}")
    if sinfo := shutil.which("sinfo"):
        states = _first_line([sinfo, "--noheader", "--summarize"])
        yield ok("SLURM", states) if states else note("SLURM", "sinfo does not respond", "run `sinfo` on this machine")


def check_disk() -> Iterator[Finding]:
    """Check the disk space for runs and the cache, and shared memory."""
    for name, folder in (("here", Path.cwd()), ("cache", _cache())):
        existing = next(place for place in (folder, *folder.parents) if place.exists())
        free = shutil.disk_usage(existing).free
        line = f"{free / 2**30:.1f} GiB free at {folder}"
        if not os.access(existing, os.W_OK):
            way_out = "set output_dir" if name == "here" else "set data.cache_dir or XDG_CACHE_HOME"
            yield problem(name, f"{existing} is not writable", way_out)
        elif free < LEAST_ROOM:
            yield problem(name, line, "free disk space, or set output_dir and data.cache_dir")
        else:
            yield (
                ok(name, line)
                if free >= USUAL_ROOM
                else note(name, line, "may be too small for checkpoints of large models")
            )
    yield _shared_memory(Path("/dev/shm"))  # noqa: S108  # only inspected, nothing is written


def check_limits() -> Iterator[Finding]:
    """Check the limits of open files and locked memory."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    line = f"{_count(soft)} (hard {_count(hard)})"
    if soft != resource.RLIM_INFINITY and soft < USUAL_FILES:
        way_out = f"ulimit -n {min(hard, 65536) if hard != resource.RLIM_INFINITY else 65536}"
        make = problem if soft < LEAST_FILES else note
        yield make("open files", line, way_out)
    else:
        yield ok("open files", line)
    locked, _ = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    if locked != resource.RLIM_INFINITY and locked < 64 << 20:
        way_out = "ulimit -l unlimited (for InfiniBand and pinned memory; on SLURM see PropagateResourceLimits)"
        yield note("locked memory", f"{locked >> 10} KiB", way_out)
    else:
        yield ok("locked memory", "unlimited" if locked == resource.RLIM_INFINITY else f"{locked >> 20} MiB")


def _shared_memory(folder: Path) -> Finding:
    if not folder.is_dir():
        return note("shared memory", f"{folder} does not exist", "NCCL uses it between GPUs of one machine")
    size = shutil.disk_usage(folder).total
    line = f"{size / 2**20:,.0f} MiB at {folder}"
    if size <= LEAST_SHARED_MEMORY:
        return note("shared memory", line, "NCCL may fail in a container: docker run --ipc=host or --shm-size=8g")
    if size < USUAL_SHARED_MEMORY:
        return note("shared memory", line, "docker run --shm-size=8g")
    return ok("shared memory", line)


def _cache() -> Path:
    return Path(environ("XDG_CACHE_HOME") or Path.home() / ".cache") / "dist_ft"


def _count(limit: int) -> str:
    return "unlimited" if limit == resource.RLIM_INFINITY else f"{limit:,}"


def _first_line(command: list[str]) -> str:
    try:
        run = subprocess.run(command, capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return (run.stdout.strip().splitlines() or [""])[0]
