"""Parameters that some or all batches do not use: DDP trains as a plain loop does, and names them."""

from __future__ import annotations

import pytest

from dist_ft.testing.spawn import spawn
from tests.dist.unused import STEPS

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

CASES = [(dtype, used) for dtype in ("float32", "bfloat16") for used in ("all", "rank", "later", "none")]


@pytest.mark.parametrize("world", [1, 2, 3])
def test_unused_parameters_are_named_and_not_updated(world: int) -> None:
    ranks = spawn(world, "tests.dist.unused:train_all", [{"dtype": dtype, "used": used} for dtype, used in CASES])
    for i, (dtype, used) in enumerate(CASES):
        for rank, results in enumerate(ranks):
            found = results[i]
            where = (dtype, used, rank, found)
            assert found["miss"] < 1e-6, where
            assert found["same"] and found["updates"] == STEPS, where
            assert len(found["told"]) == (rank == 0), where
            for told in found["told"]:
                assert "tower.weight" in told and "tower.bias" in told, where
                assert ("extra.weight" in told) == (used in ("later", "none") or (used == "rank" and world == 1)), where
                assert "first.weight" not in told, where


@pytest.mark.parametrize("world", [1, 2])
def test_a_model_that_is_used_as_a_whole_is_trained_as_ever(world: int) -> None:
    cases = [{"dtype": dtype, "used": "whole"} for dtype in ("float32", "bfloat16")]
    for results in spawn(world, "tests.dist.unused:train_all", cases):
        assert all(found["miss"] < 1e-6 and found["told"] == [] and not found["same"] for found in results), results
        assert (results[0]["module"] == "DistributedDataParallel") == (world > 1)
