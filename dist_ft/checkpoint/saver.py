"""Saving of checkpoints while training goes on.

A save has three parts, and training waits for the first one only:

1. All ranks agree on which of them writes which tensors (the plan of DCP), and each copies its own to host memory.
2. A thread of each rank writes and hashes them. There is no collective, so a slow disk cannot time one out.
3. The thread tells rank 0 what it has written, through the store of the workers. The thread of rank 0 writes the
   manifest once all parts are there, and publishes the checkpoint.

A save waits for the one before it. An error of a thread is kept in `failure` until the ranks raise it together.
"""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan
from torch.distributed.checkpoint.utils import _DistWrapper

from ..errors import DistFtError, MachineError, TrainingError
from ..process import comm
from ..state import Beat, NamedState, Progress, unwatched
from ..storage.files import is_disk_full
from . import store
from .files import STATE, Writer, read_progress, sync_folder, write_json
from .host import HostCopies
from .lineage import leads_to, set_aside
from .parts import pack_results, unpack_results

POLL_S = 0.05
AGAIN = "check the free disk space and the quota, then run the same command again to resume"


@dataclass(frozen=True)
class _Save:
    """One save: what this rank writes, and what rank 0 publishes."""

    number: int
    staging: Path
    final: Path
    writer: Writer
    plan: SavePlan
    source: Any  # gives the tensors of the plan
    metadata: Metadata | None  # of all ranks, on rank 0
    progress: Progress
    updates: int
    finish: Callable[[Path], None]


class Saver:
    """Saves the checkpoints of a run into `folder`, one at a time.

    Args:
        folder: Folder with the checkpoints of the run; created if it does not exist.
        asynchronous: Whether a thread writes a copy while training goes on; otherwise, `save` returns once the
            checkpoint is published.
        tick: Called for each piece of a file written or hashed while training waits for it.

    Attributes:
        failure: Error of this rank's thread; `settle` and `save` raise it on every rank.
    """

    def __init__(self, folder: Path, *, asynchronous: bool, tick: Beat = unwatched) -> None:
        self.folder, self.asynchronous, self.tick = folder, asynchronous, tick
        self.failure: DistFtError | None = None
        self._copies = HostCopies()
        self._thread: threading.Thread | None = None
        self._doing, self._done = "", 0  # what the thread does, and how many pieces it has written
        self._saves = 0
        self._mail = comm.open_mailbox() if dist.get_world_size() > 1 else None

    def reserve(self, state: NamedState) -> None:
        """Get memory for the copy of `state` while training goes on, before the first save. Collective.

        Args:
            state: Weights and optimizer state, as `save` will receive them.
        """
        if self.asynchronous:
            plan, planner, _ = _plan(state, Writer(self.folder, self._note))
            self._copies.reserve(plan, planner)

    def save(self, state: NamedState, progress: Progress, finish: Callable[[Path], None] = lambda path: None) -> Path:
        """Save `folder/step-<n>` and update the `latest` link. Collective.

        Args:
            state: Weights and optimizer state, as tensors or shards of this rank.
            progress: Progress of the run, written to `state.json`.
            finish: Called with the path on rank 0, once the checkpoint is published.

        Returns:
            The path that the checkpoint has once it is published.

        Raises:
            MachineError: There is not enough free disk space.
            TrainingError: A rank failed to write its files, also those of the save before.
        """
        self._wait()
        final, staging = self.folder / f"step-{progress.step}", self.folder / f".step-{progress.step}.partial"
        store.check_room(self.folder, state)
        is_sound = comm.from_main(final.exists()) and store.verify(final, self.tick) is None
        if comm.on_main(lambda: self._clear(final, staging, progress, is_sound=is_sound)):
            if dist.get_rank() == 0:
                finish(final)
            return final  # the run was resumed at this step, so the existing checkpoint is identical
        writer = Writer(staging, self._note if self.asynchronous else self.tick)
        plan, planner, metadata = _plan(state, writer)
        self._saves += 1
        source = self._copies.fill(plan, planner) if self.asynchronous else planner
        part = _Save(self._saves, staging, final, writer, plan, source, metadata, progress, state.updates, finish)
        if self.asynchronous:
            self._thread = threading.Thread(target=self._write, args=(part,), name="checkpoint", daemon=True)
            self._thread.start()
        else:
            self._write(part)
            self._wait()
        return final

    def settle(self) -> None:
        """Wait until the last save is published, and free the memory of the copies. Collective.

        Raises:
            MachineError: The disk of a rank is full.
            TrainingError: A rank failed to write its files.
        """
        self._wait()
        self._copies.clear()

    def _wait(self) -> None:
        seen = self._done
        while self._thread is not None and self._thread.is_alive():
            self._thread.join(POLL_S)
            if self._done != seen:
                seen = self._done
                self.tick(self._doing)
        self._thread = None
        failures = [failure for failure in comm.gather(self.failure) if failure is not None]
        if failures:
            raise failures[0]

    def _note(self, what: str) -> None:
        self._doing = what
        self._done += 1

    @staticmethod
    def _clear(final: Path, staging: Path, progress: Progress, *, is_sound: bool) -> bool:
        """Make room for a checkpoint; return whether it exists already."""
        if is_sound and leads_to(read_progress(final), progress):
            return True
        if is_sound:  # of another start
            set_aside(final)
        elif final.exists():  # damaged: a run that resumed from an older checkpoint has reached this step again
            shutil.rmtree(final)
        shutil.rmtree(staging, ignore_errors=True)
        staging.mkdir(parents=True)
        return False

    def _write(self, part: _Save) -> None:
        """Write this rank's part and tell rank 0; on rank 0, publish the checkpoint once all parts are written."""
        try:
            written = part.writer.write_data(part.plan, part.source).value()
            report = {"files": part.writer.digests, "written": pack_results(written)}
            if (reports := self._exchange(part.number, report)) is not None:
                _publish(part, reports)
        except Exception as error:  # reported by the main thread, see `failure`
            self.failure = _describe(error, part)
            if self._mail is not None and dist.get_rank() > 0:
                self._mail.set(_key(part.number, dist.get_rank()), "")

    def _exchange(self, number: int, report: dict[str, Any]) -> list[dict[str, Any]] | None:
        """Return the reports of all ranks on rank 0, unless a rank failed; None on other ranks."""
        rank, world = dist.get_rank(), dist.get_world_size()
        if self._mail is None:
            return [report]
        if rank > 0:
            self._mail.set(_key(number, rank), json.dumps(report))
            return None
        keys = [_key(number, other) for other in range(1, world)]
        while not self._mail.check(keys):
            time.sleep(POLL_S)
        texts = self._mail.multi_get(keys)
        for key in keys:
            self._mail.delete_key(key)
        return [report, *map(json.loads, texts)] if all(texts) else None


def save(folder: Path, state: NamedState, progress: Progress, tick: Beat = unwatched) -> Path:
    """Save one checkpoint and wait until it is published, see `Saver.save`. Collective."""
    return Saver(folder, asynchronous=False, tick=tick).save(state, progress)


def _key(number: int, rank: int) -> str:
    return f"checkpoint/{number}/{rank}"


def _plan(state: NamedState, writer: Writer) -> tuple[SavePlan, DefaultSavePlanner, Metadata | None]:
    """Divide the tensors among the ranks as `dcp.save` does. Collective."""
    group, planner = _DistWrapper(None, True, 0), DefaultSavePlanner()
    metadata: Metadata | None = None

    def own_plan() -> SavePlan:
        planner.set_up_planner(state.tensors, writer.storage_meta(), group.is_coordinator)
        writer.set_up_storage_writer(group.is_coordinator, rank=group.rank, use_collectives=True)
        return writer.prepare_local_plan(planner.create_local_plan())

    def all_plans(plans: list[SavePlan]) -> list[SavePlan]:
        nonlocal metadata
        plans, metadata = planner.create_global_plan(plans)
        return writer.prepare_global_plan(plans)

    try:
        plan = group.reduce_scatter("plan", own_plan, all_plans)
    except CheckpointException as error:  # a BaseException, which `except Exception` does not catch
        raise TrainingError.of(str(writer.path), f"cannot be written: {error}", AGAIN) from error
    return planner.finish_plan(plan), planner, metadata


def _publish(part: _Save, reports: list[dict[str, Any]]) -> None:
    assert part.metadata is not None, "rank 0 has the metadata of all ranks"
    part.writer.finish(part.metadata, [unpack_results(report["written"]) for report in reports])
    files = {name: entry for report in reports for name, entry in report["files"].items()}
    files[".metadata"] = part.writer.digests[".metadata"]
    files[STATE] = write_json(part.staging / STATE, {**asdict(part.progress), "updates": part.updates})
    write_json(part.staging / store.MANIFEST, {"version": store.VERSION, "files": files})
    sync_folder(part.staging)
    part.staging.rename(part.final)
    sync_folder(part.final.parent)
    store.point(part.final.parent / "latest", part.final)
    part.finish(part.final)


def _describe(error: Exception, part: _Save) -> DistFtError:
    cause = next((e for e in (error, *part.writer.errors) if isinstance(e, OSError)), error)
    if is_disk_full(cause):
        return MachineError.of(str(part.staging), f"no space is left for a checkpoint: {cause}", AGAIN)
    return TrainingError.of(str(part.staging), f"cannot be written: {cause}", AGAIN)
