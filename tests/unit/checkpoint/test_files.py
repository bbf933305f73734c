"""The files of a checkpoint tick while they are written, hashed and read, so that a slow disk is no hang."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_ft.checkpoint import files
from dist_ft.checkpoint.reader import SafeReader
from dist_ft.storage import files as storage_files

TENSORS = {f"layer.{i}": torch.arange(4000.0) + i for i in range(6)}


def save(folder: Path, tick: list[str]) -> None:
    dcp.save(dict(TENSORS), storage_writer=files.Writer(folder, tick.append), no_dist=True)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_each_tensor_ticks_when_it_is_written_and_when_it_is_read(tmp_path: Path) -> None:
    written: list[str] = []
    save(tmp_path, written)
    assert len(written) >= len(TENSORS) and "__0_0.distcp" in written[0]
    read: list[str] = []
    found = {name: torch.zeros_like(tensor) for name, tensor in TENSORS.items()}
    planner = files.TickingLoad(read.append)
    dcp.load(found, storage_reader=SafeReader(tmp_path), planner=planner, no_dist=True)
    assert all(torch.equal(found[name], tensor) for name, tensor in TENSORS.items())
    assert sorted(read) == sorted(f"{name} of the checkpoint was read" for name in TENSORS)


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_a_large_file_is_synced_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    plain = os.fsync

    def fsync(handle: int) -> None:
        sizes.append(os.fstat(handle).st_size)
        plain(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(files, "SYNCED_BYTES", 20_000)
    monkeypatch.setattr(files, "PIECE_BYTES", 8_000)
    monkeypatch.setattr(files, "HASHED_APART_BYTES", 4_000)
    save(tmp_path, [])
    (file,) = tmp_path.glob("*.distcp")
    pieces = [size for size in sizes if size <= file.stat().st_size]
    assert len(pieces) >= 4 and file.stat().st_size in sizes
    assert max(b - a for a, b in zip([0, *pieces], pieces, strict=False)) <= 20_000 + 2 * 16_000


def test_each_piece_that_is_hashed_ticks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(storage_files, "READ_BYTES", 1000)
    path, ticks = tmp_path / "file", []
    path.write_bytes(bytes(range(256)) * 20)
    assert files.digest(path, ticks.append) == {
        "bytes": 5120,
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
    }
    assert ticks == [f"hashing {path}"] * 6
