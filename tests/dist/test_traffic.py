"""FSDP2 gathers and reduces what it must, `plan` counts what that holds, and no stale weights stay gathered."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.testing.spawn import spawn
from tests.dist.traffic import MICRO_BATCHES

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

CASES: list[tuple[str, dict[str, Any]]] = [
    (dtype, {"gradient_reduction": when, "reshard_after_forward": reshards})
    for dtype in ("float32", "bfloat16")
    for when in ("micro_batch", "step")
    for reshards in (True, False)
]


def test_a_step_communicates_what_it_must_and_plan_counts_it() -> None:
    cases = [{"dtype": dtype, "keys": keys} for dtype, keys in CASES]
    found, _ = spawn(2, "tests.dist.traffic:count_all", cases)
    for (dtype, keys), seen in zip(CASES, found, strict=True):
        where = (dtype, keys, seen)
        blocks, root, *_ = seen["units"] - 1, seen["gathered"][0]
        uses = 2 if keys["reshard_after_forward"] else 1  # forward and backward
        assert len(seen["gathered"]) == MICRO_BATCHES * (1 + uses * blocks), where
        reductions = MICRO_BATCHES if keys["gradient_reduction"] == "micro_batch" else 1
        assert len(seen["reduced"]) == reductions * seen["units"], where
        assert seen["evaluation"] <= 1 + 2 * blocks, where  # what stands outside the blocks stays between batches
        assert seen["same"], where
        largest = max(seen["gathered"][1:])
        held = 2 if keys["reshard_after_forward"] else blocks
        assert seen["parts"]["gathered outside blocks"] == root, where
        assert seen["parts"]["gathered blocks"] == held * largest, where
        whole = sum(seen["reduced"]) if keys["gradient_reduction"] == "step" else 0
        assert seen["parts"].get("whole gradients", 0) == whole, where


def test_a_loaded_state_replaces_weights_that_an_evaluation_gathered() -> None:
    cases = [
        {"engine": engine, "dtype": dtype, "keys": {}}
        for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")
        for dtype in ("float32", "bfloat16")
    ]
    for ranks in zip(cases, *spawn(2, "tests.dist.traffic:load_after_evaluation", cases), strict=True):
        case, *found = ranks
        for rank in found:
            assert rank["before"] == rank["after"] != rank["between"], (case, rank)
            assert rank["same"] and rank["dtypes"] == ["torch.float32"], (case, rank)
