"""Atomic checkpoints whose tensors are keyed by parameter name.

A checkpoint is a folder `step-<n>` with PyTorch Distributed Checkpoint (DCP) files, `state.json` and `manifest.json`,
which is written last and holds the size and SHA-256 of every file. The folder is written under a temporary name and
published with a single rename; the manifest is verified before a checkpoint is loaded. The folder of a step is never
overwritten, because a crash while DCP files are overwritten in place silently mixes the tensors of two steps.
"""

from __future__ import annotations

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

from ..config.plan import saved_steps as steps
from ..errors import MachineError, Problem, RequestError, TrainingError
from ..process import comm
from ..state import Beat, NamedState, Progress, unwatched
from .files import STATE, TickingLoad, digest, open_writer, read_progress, sync_folder
from .lineage import leads_to, set_aside
from .reader import SafeReader

MANIFEST = "manifest.json"
VERSION = 1
ROOM_FACTOR = 1.1  # required free disk space, as a multiple of the checkpoint size


def save(folder: Path, state: NamedState, progress: Progress, tick: Beat = unwatched) -> Path:
    """Save `folder/step-<n>` and update the `latest` link; a collective call for all ranks.

    Args:
        folder: Folder with the checkpoints of the run; created if it does not exist.
        state: Weights and optimizer state, as tensors or shards of this rank.
        progress: Progress of the run, written to `state.json`.
        tick: Called for each tensor written and piece of a file hashed.

    Returns:
        The path of the checkpoint.

    Raises:
        MachineError: If there is not enough free disk space.
        TrainingError: If a rank fails to write its files.
    """
    final = folder / f"step-{progress.step}"
    staging = folder / f".step-{progress.step}.partial"
    _check_room(folder, state)
    is_main = torch.distributed.get_rank() == 0
    is_sound = is_main and final.exists() and verify(final, tick) is None
    if comm.from_main(is_sound and leads_to(read_progress(final), progress)):
        return final  # the run was resumed at this step, so the existing checkpoint is identical
    if is_main:
        if is_sound:  # of another start
            set_aside(final)
        elif final.exists():  # damaged: a run that resumed from an older checkpoint has reached this step again
            shutil.rmtree(final)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
    comm.barrier()
    try:
        dcp.save(state.tensors, storage_writer=open_writer(staging, tick))
    except CheckpointException as error:  # a BaseException, which `except Exception` does not catch
        raise TrainingError.of(
            str(staging),
            f"cannot be written: {error}",
            "check the free disk space and the quota, then run the same command again to resume",
        ) from error
    rank = torch.distributed.get_rank()
    own = {path.name: digest(path, tick) for path in sorted(staging.glob(f"__{rank}_*"))}
    files = {name: entry for part in comm.gather(own) for name, entry in part.items()}
    if is_main:
        _write(staging / STATE, {**asdict(progress), "updates": state.updates})
        files |= {path.name: digest(path, tick) for path in (staging / ".metadata", staging / STATE)}
        _write(staging / MANIFEST, {"version": VERSION, "files": files})
        sync_folder(staging)
        staging.rename(final)
        sync_folder(folder)
        point(folder / "latest", final)
    comm.barrier()
    return final


def load(path: Path, state: NamedState, tick: Beat = unwatched) -> None:
    """Load the checkpoint at `path`, which must have been verified, into the tensors of `state` in place.

    Raises:
        RequestError: If the checkpoint belongs to a different model or method.
    """
    reader = SafeReader(path)
    held = set(reader.read_metadata().state_dict_metadata)
    if held != set(state.tensors):
        missing, extra = sorted(set(state.tensors) - held), sorted(held - set(state.tensors))
        rule = f"its tensors do not match those that this run trains (missing: {missing[:3]}, unexpected: {extra[:3]})"
        raise RequestError.of(str(path), rule, "resume with the same model, task and method as the run that saved it")
    try:
        dcp.load(state.tensors, storage_reader=SafeReader(path), planner=TickingLoad(tick))
    except CheckpointException as error:
        raise RequestError.of(
            str(path),
            f"cannot be loaded in this run: {error}",
            "resume with the same model, task and method as the run that saved it",
        ) from error
    state.updates = int(json.loads((path / STATE).read_text())["updates"])


def verify(path: Path, tick: Beat = unwatched) -> str | None:
    """Check every file of a checkpoint against its manifest.

    Args:
        path: Folder of the checkpoint.
        tick: Called for each piece of a file hashed.

    Returns:
        The reason why the checkpoint is not valid, or None if it is valid.
    """
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, files = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or unreadable, so the checkpoint is incomplete"
    if version != VERSION:
        return f"manifest.json has version {version!r}, and this version of dist-ft reads {VERSION}"
    if not isinstance(files, dict) or text != _encode(manifest):
        return "manifest.json was changed after it was written"
    for name, entry in files.items():
        try:
            if digest(path / name, tick) != entry:
                return f"{name} does not match the size and SHA-256 in manifest.json"
        except OSError:
            return f"{name} is missing"
    return None


def newest_sound(
    folder: Path, tick: Beat = unwatched, settings: str | None = None
) -> tuple[Path | None, list[Problem]]:
    """Find the newest valid checkpoint.

    Args:
        folder: Folder with the checkpoints of the run.
        tick: Called for each piece of a file hashed.
        settings: Those of the run; checkpoints that were saved under others are moved aside. None accepts all.

    Returns:
        The path of the checkpoint, or None if none is valid, and a problem for each newer checkpoint that is not valid.
    """
    told: list[Problem] = []
    for path in steps(folder):
        reason = verify(path, tick)
        if reason is not None:
            told.append(Problem(str(path), reason, "skipping it; the next older checkpoint is used if it is valid"))
        elif settings and read_progress(path).settings not in (None, settings):
            rule = "was saved by a run with other settings"
            told.append(Problem(str(path), rule, f"moved to {set_aside(path)}; delete it if it is not needed"))
        else:
            return path, told
    return None, told


def prune(folder: Path, keep: int | None, best_step: int | None, tick: Beat = unwatched) -> None:
    """Delete all checkpoints except for the `keep` newest ones and the best one.

    Args:
        folder: Folder with the checkpoints of the run.
        keep: Number of newest checkpoints to keep; None keeps all.
        best_step: Step of the best checkpoint, which is always kept.
        tick: Called for each checkpoint deleted.
    """
    if keep is None:
        return
    for path in steps(folder)[keep:]:
        if path.name != f"step-{best_step}":
            shutil.rmtree(path)
            tick(f"{path} was deleted")


def point(link: Path, target: Path) -> None:
    """Atomically make `link` a relative symbolic link to `target`, which must be in the same folder."""
    staging = link.with_name(f".{link.name}.new")
    staging.unlink(missing_ok=True)
    staging.symlink_to(target.name)
    staging.replace(link)


def _check_room(folder: Path, state: NamedState) -> None:
    own = sum(_local(t).numel() * t.element_size() for t in state.tensors.values())
    sharded = any(hasattr(t, "to_local") for t in state.tensors.values())
    # Plain tensors are replicated on every rank and written once, whereas the shards of all ranks are written.
    needed = ROOM_FACTOR * (sum(comm.gather(own)) if sharded else own)
    folder.mkdir(parents=True, exist_ok=True)
    free = comm.from_main(shutil.disk_usage(folder).free)
    if needed > free:
        raise MachineError.of(
            str(folder),
            f"a checkpoint needs {needed / 2**30:.2f} GiB of disk space, but only {free / 2**30:.2f} GiB are free",
            "free disk space or set train.save_total_limit, then run the same command again to resume",
        )


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard of an engine


def _write(path: Path, value: Mapping[str, Any]) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(_encode(value))
        file.flush()
        os.fsync(file.fileno())


def _encode(value: Mapping[str, Any]) -> str:
    return json.dumps(value, indent=1)
