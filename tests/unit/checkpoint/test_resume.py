"""A checkpoint is verified once, on rank 0, and every rank learns the result."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint import resume
from dist_ft.process import comm
from dist_ft.process.place import Place, Worker


@pytest.mark.parametrize("rank", [0, 1])
def test_only_rank_0_reads_the_files_that_it_verifies(rank: int, tmp_path: Path, monkeypatch: Any) -> None:
    ticks: list[str] = []
    worker = Worker(Place(rank, 2, rank), torch.device("cpu"), sys.stderr, lambda phase: None, ticks.append)
    verified: list[Path] = []

    def verify(path: Path, tick: Any) -> str:
        verified.append(path)
        tick("hashing")
        return "is torn"

    monkeypatch.setattr(resume.checkpoint, "verify", verify)
    monkeypatch.setattr(comm, "from_main", lambda value: value if rank == 0 else "is torn")
    assert resume._verify_once(tmp_path, worker) == "is torn"
    assert (verified, ticks) == (([tmp_path], ["hashing"]) if rank == 0 else ([], []))
