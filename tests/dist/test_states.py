"""The state that a checkpoint saves is what the optimizer holds, where it lives: nothing is gathered or copied."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.testing.spawn import spawn

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(
        (engine, dtype, {})
        for engine in ("ddp", "fsdp", "zero1", "zero2", "zero3")
        for dtype in ("float32", "bfloat16")
    ),
    ("zero1", "float32", {"offload": "optimizer"}),
    ("zero2", "bfloat16", {"offload": "optimizer"}),
    ("zero3", "bfloat16", {"offload": "optimizer"}),
    ("zero3", "bfloat16", {"offload": "params"}),
]


@pytest.mark.parametrize("world", [1, 2])
def test_a_state_holds_the_optimizer_s_own_tensors(world: int) -> None:
    cases = [{"engine": engine, "dtype": dtype, "keys": keys} for engine, dtype, keys in CASES]
    ranks = spawn(world, "tests.dist.precision:watch_states", cases)
    for i, case in enumerate(CASES):
        for rank in ranks:
            assert rank[i]["collectives"] == 0, case
            assert rank[i]["copies"] == [], case
            assert rank[i]["dtypes"] == ["torch.float32"], case
            assert rank[i]["shapes"] == ranks[0][0]["shapes"], case
            assert rank[i]["changed"] == [], case
