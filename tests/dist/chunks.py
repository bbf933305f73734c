"""What worker groups run to compute losses in chunks of a few tokens."""

from __future__ import annotations

from typing import Any

from dist_ft.model import head
from dist_ft.process.place import Place
from tests.dist.cases import run_cases


def run_in_chunks(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Each case in turn, with chunks of 3 tokens where `train.chunked_loss=true`."""
    head.LEAST_ROWS = 3
    return run_cases(place, cases)
