"""The files of a checkpoint are verified once: each rank reads its share, and all learn the result."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint import store
from dist_ft.checkpoint.files import write_json
from dist_ft.process import comm

WORLD = 3


@pytest.mark.parametrize("torn", [None, 0, 4])
def test_ranks_share_the_files_of_a_checkpoint(torn: int | None, tmp_path: Path, monkeypatch: Any) -> None:
    files = {f"__{i}_0.distcp": write_json(tmp_path / f"__{i}_0.distcp", {"rank": i}) for i in range(7)}
    write_json(tmp_path / "manifest.json", {"version": store.VERSION, "files": files})
    if torn is not None:
        (tmp_path / f"__{torn}_0.distcp").write_text("torn")
    read: list[str] = []
    shares: list[Any] = []

    def gather(value: Any) -> list[Any]:
        shares.append(value)
        return shares

    monkeypatch.setattr(comm.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(comm.dist, "get_world_size", lambda: WORLD)
    monkeypatch.setattr(comm, "on_main", lambda find: find())
    monkeypatch.setattr(comm, "gather", gather)
    for rank in range(WORLD):
        monkeypatch.setattr(comm.dist, "get_rank", lambda rank=rank: rank)
        reason = store.verify(tmp_path, lambda what: read.append(what.rpartition("/")[2]))
    assert sorted(read) == sorted(files), "each file is read by one rank"
    assert reason == (
        f"__{torn}_0.distcp does not match the size and SHA-256 in manifest.json" if torn is not None else None
    )
