"""What a worker group does whose rank 1 cannot write a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from dist_ft.checkpoint import files
from dist_ft.checkpoint.saver import Saver
from dist_ft.errors import DistFtError
from dist_ft.process.place import Place
from dist_ft.state import NamedState, Progress


def fail_on_rank_1(place: Place, folder: str) -> dict[str, Any]:
    """Save twice; rank 1 cannot write the second checkpoint, and both learn it when they settle."""
    saver = Saver(Path(folder), asynchronous=True)
    state = NamedState({f"model/{i}": torch.full((64, 64), float(i)) for i in range(8)}, updates=1)
    saver.save(state, Progress(1, 2, "ddp", None, None, None, 0))
    saver.settle()
    if place.rank == 1:
        files._HashedFile._write_piece = refuse  # type: ignore[method-assign]
    saver.save(state, Progress(2, 2, "ddp", None, None, None, 0))
    try:
        saver.settle()
    except DistFtError as error:
        return {"raised": str(error), "own": saver.failure is not None}
    return {"raised": None, "own": saver.failure is not None}


def refuse(file: Any, piece: memoryview) -> None:
    raise OSError(5, "refused by the disk")
