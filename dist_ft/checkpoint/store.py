"""Checkpoints by parameter name, as transactions.

A checkpoint is a folder `step-<n>` of torch Distributed Checkpoint files, `state.json` and, written last,
`manifest.json` with the size and SHA-256 of every file. It is staged under another name and published by one rename;
reading verifies the manifest first. A folder of a step is never reused: overwriting DCP files in place and dying
half-way mixes tensors of two steps without an error.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.tensor import DTensor

from ..errors import MachineError, Problem, RequestError, TrainingError
from ..process import comm
from ..state import NamedState, Progress
from .reader import SafeReader

MANIFEST = "manifest.json"
STATE = "state.json"
ROOM_FACTOR = 1.1  # what must be free, in sizes of the checkpoint


def save(folder: Path, state: NamedState, progress: Progress) -> Path:
    """Write `folder/step-<n>` on all ranks together and point `latest` at it.

    Raises:
        MachineError: there is no room.
        TrainingError: a rank could not write.
    """
    final = folder / f"step-{progress.step}"
    staging = folder / f".step-{progress.step}.partial"
    _check_room(folder, state)
    if comm.from_main(final.exists()):  # resumed at this very step: what stands there is this state
        return final
    if torch.distributed.get_rank() == 0:
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    comm.barrier()
    writer = dcp.FileSystemWriter(staging, single_file_per_rank=True, sync_files=True, thread_count=1)
    try:
        dcp.save(state.tensors, storage_writer=writer)
    except CheckpointException as error:  # a BaseException, which no `except Exception` would see
        raise TrainingError.of(str(staging), f"could not be written: {error}", "see disk and quota, resume") from error
    rank = torch.distributed.get_rank()
    own = {path.name: _digest(path) for path in sorted(staging.glob(f"__{rank}_*"))}
    files = {name: entry for part in comm.gather(own) for name, entry in part.items()}
    if rank == 0:
        _write(staging / STATE, {**asdict(progress), "updates": state.updates})
        files |= {path.name: _digest(path) for path in (staging / ".metadata", staging / STATE)}
        _write(staging / MANIFEST, {"version": 1, "files": files})
        _sync_folder(staging)
        staging.rename(final)
        _sync_folder(folder)
        point(folder / "latest", final)
    comm.barrier()
    return final


def load(path: Path, state: NamedState) -> None:
    """Fill the tensors of `state` from the checkpoint `path`, which has been verified.

    Raises:
        RequestError: the checkpoint is of another model or method.
    """
    reader = SafeReader(path)
    held = set(reader.read_metadata().state_dict_metadata)
    if held != set(state.tensors):
        missing, extra = sorted(set(state.tensors) - held), sorted(held - set(state.tensors))
        rule = f"holds other tensors than this run trains (lacks {missing[:3]}, has besides {extra[:3]})"
        raise RequestError.of(str(path), rule, "resume with the model and method that it was made with")
    try:
        dcp.load(state.tensors, storage_reader=SafeReader(path))
    except CheckpointException as error:
        raise RequestError.of(str(path), f"does not fit this run: {error}", "resume with the same model") from error
    state.updates = int(json.loads((path / STATE).read_text())["updates"])


def read_progress(path: Path) -> Progress:
    """The `state.json` of a checkpoint."""
    values = json.loads((path / STATE).read_text())
    values.pop("updates")
    return Progress(**values)


def verify(path: Path) -> str | None:
    """Why the checkpoint is not sound, or None if every file is as it was written."""
    try:
        files: Mapping[str, Any] = json.loads((path / MANIFEST).read_text())["files"]
    except (OSError, ValueError, KeyError):
        return "it has no manifest, so it was never finished"
    for name, entry in files.items():
        try:
            if _digest(path / name) != entry:
                return f"{name} is not what was written"
        except OSError:
            return f"{name} is missing"
    return None


def steps(folder: Path) -> list[Path]:
    """The published checkpoints, newest first."""
    found = [path for path in folder.glob("step-*") if path.name[5:].isdigit()]
    return sorted(found, key=lambda path: int(path.name[5:]), reverse=True)


def newest_sound(folder: Path) -> tuple[Path | None, list[Problem]]:
    """The newest checkpoint that verifies, and what is wrong with newer ones."""
    torn: list[Problem] = []
    for path in steps(folder):
        reason = verify(path)
        if reason is None:
            return path, torn
        torn.append(Problem(str(path), reason, "an older one is used"))
    return None, torn


def prune(folder: Path, keep: int | None, best_step: int | None) -> None:
    """Remove all but the `keep` newest checkpoints and the best; None keeps all."""
    if keep is None:
        return
    for path in steps(folder)[keep:]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)


def point(link: Path, target: Path) -> None:
    """Make `link` a relative symbolic link to `target`, at once."""
    staging = link.with_name(f".{link.name}.new")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target.name)
    staging.replace(link)


def _check_room(folder: Path, state: NamedState) -> None:
    own = sum(_local(t).numel() * t.element_size() for t in state.tensors.values())
    sharded = any(isinstance(t, DTensor) for t in state.tensors.values())
    # Plain tensors stand on every rank and are written once; shards add up.
    needed = ROOM_FACTOR * (sum(comm.gather(own)) if sharded else own)
    folder.mkdir(parents=True, exist_ok=True)
    free = comm.from_main(shutil.disk_usage(folder).free)
    if needed > free:
        raise MachineError.of(
            str(folder),
            f"a checkpoint needs {needed / 2**30:.2f} GiB, {free / 2**30:.2f} GiB are free",
            "make room or set train.save_total_limit; the run goes on from the last checkpoint",
        )


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _digest(path: Path) -> dict[str, Any]:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(2**22):
            digest.update(chunk)
        return {"bytes": file.tell(), "sha256": digest.hexdigest()}


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def _sync_folder(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
