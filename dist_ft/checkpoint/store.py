"""Atomic checkpoints whose tensors are keyed by parameter name.

A checkpoint is a folder `step-<n>` with PyTorch Distributed Checkpoint (DCP) files, `state.json` and `manifest.json`,
which is written last and holds the size and SHA-256 of every file. The folder is written under a temporary name and
published with a single rename; the manifest is verified before a checkpoint is loaded. The folder of a step is never
overwritten, because a crash while DCP files are overwritten in place silently mixes the tensors of two steps.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.api import CheckpointException

from ..config.plan import saved_steps as steps
from ..config.train import TrainConfig
from ..errors import MachineError, Problem, RequestError
from ..process import comm
from ..state import Beat, NamedState, unwatched
from .files import STATE, TickingLoad, digest, encode_json, read_progress
from .lineage import set_aside
from .reader import SafeReader

MANIFEST = "manifest.json"
WEIGHTS = "model/"  # beginning of the names of weights
VERSION = 1
THREADS = 4  # that verify files on one rank
OTHER_SETTINGS = "was saved by a run with other settings"
ROOM_FACTOR = 1.1  # required free disk space, as a multiple of the checkpoint size


def load(path: Path, state: NamedState, tick: Beat = unwatched) -> None:
    """Load the checkpoint at `path`, which must have been verified, into the tensors of `state` in place.

    Raises:
        RequestError: If the checkpoint belongs to a different model or method.
    """
    reader = SafeReader(path)
    held = set(reader.read_metadata().state_dict_metadata)
    wanted = dict(state.tensors)
    if not holds_moments(held):
        wanted = weights_of(state).tensors
    if held != set(wanted):
        missing, extra = sorted(set(wanted) - held), sorted(held - set(wanted))
        rule = f"its tensors do not match those that this run trains (missing: {missing[:3]}, unexpected: {extra[:3]})"
        raise RequestError.of(str(path), rule, "resume with the same model, task and method as the run that saved it")
    try:
        dcp.load(wanted, storage_reader=SafeReader(path), planner=TickingLoad(tick))
    except CheckpointException as error:
        raise RequestError.of(
            str(path),
            f"cannot be loaded in this run: {error}",
            "resume with the same model, task and method as the run that saved it",
        ) from error
    state.updates = int(json.loads((path / STATE).read_text())["updates"])


def weights_of(state: NamedState) -> NamedState:
    """Return a state without the moments of the optimizer."""
    return NamedState({n: t for n, t in state.tensors.items() if n.startswith(WEIGHTS)}, state.updates)


def holds_moments(names: Iterable[str]) -> bool:
    """Return whether a checkpoint with these tensors holds the moments of the optimizer."""
    return any(not name.startswith(WEIGHTS) for name in names)


def verify(path: Path, tick: Beat = unwatched) -> str | None:
    """Check every file of a checkpoint against its manifest; ranks share the files. Collective.

    Args:
        path: Folder of the checkpoint.
        tick: Called for each piece of a file hashed.

    Returns:
        The reason why the checkpoint is not valid, or None if it is valid.
    """
    files: dict[str, Any] | str = comm.on_main(lambda: _read_manifest(path))
    if isinstance(files, str):
        return files
    own = comm.share_of(sorted(files.items()))
    with ThreadPoolExecutor(THREADS) as pool:
        found = list(pool.map(lambda item: _verify_file(path / item[0], item[1], tick), own))
    return next((reason for part in comm.gather(found) for reason in part if reason is not None), None)


def _read_manifest(path: Path) -> dict[str, Any] | str:
    """Return the files of a manifest, or the reason why it is not valid."""
    try:
        text = (path / MANIFEST).read_text(encoding="utf-8")
        manifest = json.loads(text)
        version, files = manifest["version"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError):
        return "manifest.json is missing or unreadable, so the checkpoint is incomplete"
    if version != VERSION:
        return f"manifest.json has version {version!r}, and this version of dist-ft reads {VERSION}"
    if not isinstance(files, dict) or text != encode_json(manifest):
        return "manifest.json was changed after it was written"
    return files


def _verify_file(path: Path, entry: Any, tick: Beat) -> str | None:
    try:
        if digest(path, tick) != entry:
            return f"{path.name} does not match the size and SHA-256 in manifest.json"
    except OSError:
        return f"{path.name} is missing"
    return None


def newest_sound(
    folder: Path, tick: Beat = unwatched, settings: str | None = None
) -> tuple[Path | None, list[Problem]]:
    """Find the newest valid checkpoint. Collective.

    Args:
        folder: Folder with the checkpoints of the run.
        tick: Called for each piece of a file hashed.
        settings: Those of the run; newer checkpoints that were saved under others are moved aside. None accepts all.

    Returns:
        The path of the checkpoint, or None if there are no checkpoints, and a problem for each newer one that is not
        used.

    Raises:
        RequestError: There are checkpoints, but none is valid: the run does not begin at step 0 by itself.
    """
    told: list[Problem] = []
    others: list[Path] = []
    found: list[Path] = comm.from_main(steps(folder))
    for path in found:
        reason = verify(path, tick)
        if reason is not None:
            told.append(Problem(str(path), reason, "skipping it; the next older checkpoint is used if it is valid"))
        elif settings and read_progress(path).settings not in (None, settings):
            others.append(path)
        else:
            return path, [*told, *comm.on_main(lambda: [_set_other_aside(other) for other in others])]
    if not found:
        return None, []
    way_out = "restore one, or set run_name to a new name to begin at step 0"
    unused = [(problem.where, problem.rule) for problem in told] + [(str(other), OTHER_SETTINGS) for other in others]
    raise RequestError(*(Problem(where, rule, way_out) for where, rule in unused))


def _set_other_aside(path: Path) -> Problem:
    return Problem(str(path), OTHER_SETTINGS, f"moved to {set_aside(path)}; delete it if it is not needed")


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


def check_room(folder: Path, state: NamedState) -> None:
    """Check that the disk has room for a checkpoint of `state`. Collective.

    Raises:
        MachineError: It has not.
    """
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


def check_rooms(folder: Path, size: int, train: TrainConfig, *, keeps_best: bool) -> str:
    """Check that the disk has room for all checkpoints that a run keeps, and for the one being written.

    Args:
        folder: Folder with the checkpoints of the run.
        size: Size of a checkpoint in bytes.
        train: The `train` group.
        keeps_best: Whether the best checkpoint is kept besides the newest ones.

    Returns:
        A line that tells the room needed and free.

    Raises:
        MachineError: It has not.
    """
    kept = train.checkpoints_kept if train.saves_on_the_way else 0
    count = 1 + (kept or 0) + (keeps_best and kept is not None)
    held = sum(file.stat().st_size for path in steps(folder) for file in path.iterdir())
    needed = ROOM_FACTOR * size * count
    free = disk_usage_of(folder).free
    room = f"{count} checkpoint{'s' * (count > 1)} of {size / 2**30:.2f} GiB (one of them being written)"
    rule = f"{room} need {needed / 2**30:.2f} GiB of disk space"
    if needed > free + held:
        way_out = "free disk space, lower train.save_total_limit, or set output_dir to a larger disk"
        raise MachineError.of(str(folder), f"{rule}, but only {(free + held) / 2**30:.2f} GiB are free", way_out)
    more = "; the others are kept too (train.save_total_limit)" if kept is None else ""
    return f"{rule}, and {(free + held) / 2**30:.2f} GiB are free{more}"


def disk_usage_of(folder: Path) -> Any:
    """Return the disk usage where `folder` is or will be."""
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder)


def _local(tensor: Any) -> torch.Tensor:
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor  # a shard of an engine
