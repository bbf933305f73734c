"""Files of a checkpoint: written, synced and hashed piece by piece, so that a slow disk never looks like a hang."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystem
from torch.distributed.checkpoint.planner import ReadItem

from ..state import Beat, Progress
from ..storage.files import digest_file

STATE = "state.json"
SYNCED_BYTES = 256 * 2**20  # written between two syncs: the last one would otherwise wait for all of a large file


def open_writer(folder: Path, tick: Beat) -> dcp.FileSystemWriter:
    """Return DCP's writer of one synced file per rank, which ticks after each tensor."""
    writer = dcp.FileSystemWriter(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
    writer.fs = _TickingFiles(tick)
    return writer


class TickingLoad(DefaultLoadPlanner):
    """DCP's planner for loading, which ticks after each tensor (or part of one) that was read."""

    def __init__(self, tick: Beat) -> None:
        super().__init__()
        self.tick = tick

    def commit_tensor(self, read_item: ReadItem, tensor: Tensor) -> None:
        """Tick: the tensor is filled."""
        super().commit_tensor(read_item, tensor)
        self.tick(f"{read_item.dest_index.fqn} of the checkpoint was read")


def digest(path: Path, tick: Beat) -> dict[str, Any]:
    """Return the size and SHA-256 of a file."""
    return {"bytes": path.stat().st_size, "sha256": digest_file(path, tick)}


def read_progress(path: Path) -> Progress:
    """Read the progress of a run from the `state.json` of a checkpoint."""
    values = json.loads((path / STATE).read_text())
    values.pop("updates")
    lineage = tuple((str(start), int(step)) for start, step in values.pop("lineage", ()))
    accepted = tuple(values.pop("accepted", ()))
    return Progress(**values, lineage=lineage, accepted=accepted)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _TickingFiles(FileSystem):
    def __init__(self, tick: Beat) -> None:
        self.tick = tick

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        with _TickingFile(Path(path), self.tick) as file:
            yield cast(io.IOBase, file)


class _TickingFile(io.BufferedWriter):
    def __init__(self, path: Path, tick: Beat) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.path = path
        self.tick = tick
        self.unsynced = 0

    def write(self, data: Any) -> int:
        written = super().write(data)
        self.unsynced += written
        if self.unsynced >= SYNCED_BYTES:
            self.flush()
            os.fsync(self.fileno())
            self.unsynced = 0
        self.tick(f"writing {self.path}")
        return written
