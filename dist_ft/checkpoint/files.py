"""Files of a checkpoint: written, synced and hashed piece by piece, so that a slow disk never looks like a hang."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
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
PIECE_BYTES = 4 * 2**20
HASHED_APART_BYTES = 2**18  # smaller pieces are hashed at once
SYNCED_BYTES = 256 * 2**20  # written between two syncs: the last one would otherwise wait for all of a large file


class Writer(dcp.FileSystemWriter):
    """DCP's writer of one synced file per rank, which ticks after each piece and hashes what it writes.

    Attributes:
        digests: Size and SHA-256 of each file, by its final name, once it is closed.
        errors: What the operating system refused; torch hides it behind errors of its own.
    """

    def __init__(self, folder: Path, tick: Beat) -> None:
        super().__init__(folder, single_file_per_rank=True, sync_files=True, thread_count=1)
        self.digests: dict[str, dict[str, Any]] = {}
        self.errors: list[OSError] = []
        self.fs = _HashedFiles(self, tick)


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


def write_json(path: Path, value: Mapping[str, Any]) -> dict[str, Any]:
    """Write a value as JSON, flush it to disk, and return the size and SHA-256 of the file."""
    data = encode_json(value).encode()
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    return {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def encode_json(value: Mapping[str, Any]) -> str:
    """Return the text that `write_json` writes."""
    return json.dumps(value, indent=1)


def sync_folder(path: Path) -> None:
    """Flush the entries of a folder to disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


class _HashedFiles(FileSystem):
    def __init__(self, writer: Writer, tick: Beat) -> None:
        self.writer = writer
        self.tick = tick

    @contextlib.contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[io.IOBase]:
        if mode != "wb":
            with super().create_stream(path, mode) as stream:
                yield stream
            return
        try:
            with ThreadPoolExecutor(1) as pool, _HashedFile(Path(path), pool, self.tick) as file:
                yield cast(io.IOBase, file)
        except OSError as error:
            self.writer.errors.append(error)
            raise
        self.writer.digests[Path(path).name.removesuffix(".tmp")] = file.entry


class _HashedFile(io.BufferedWriter):
    """A file whose pieces are hashed by another thread while they are written."""

    def __init__(self, path: Path, pool: ThreadPoolExecutor, tick: Beat) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.path, self.pool, self.tick = path, pool, tick
        self.sum = hashlib.sha256()
        self.size = self.unsynced = 0

    @property
    def entry(self) -> dict[str, Any]:
        return {"bytes": self.size, "sha256": self.sum.hexdigest()}

    def write(self, data: Any) -> int:
        whole = memoryview(data).cast("B")
        for start in range(0, len(whole), PIECE_BYTES):
            self._write_piece(whole[start : start + PIECE_BYTES])
        return len(whole)

    def _write_piece(self, piece: memoryview) -> None:
        hashing = self.pool.submit(self.sum.update, piece) if len(piece) >= HASHED_APART_BYTES else None
        if hashing is None:
            self.sum.update(piece)
        try:
            super().write(piece)
            self.size += len(piece)
            self.unsynced += len(piece)
            if self.unsynced >= SYNCED_BYTES:
                self.flush()
                os.fsync(self.fileno())
                self.unsynced = 0
        finally:
            if hashing is not None:
                hashing.result()  # the memory of the piece belongs to the caller
        self.tick(f"writing {self.path}")
