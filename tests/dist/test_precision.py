"""In bfloat16, all engines have one precision: bfloat16 weights, float32 masters, float32 sums of gradients."""

from __future__ import annotations

from typing import Any

import pytest

from dist_ft.testing.spawn import spawn

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
ARCHITECTURES = ("llama", "mixtral")
CASES: list[tuple[str, dict[str, Any]]] = [
    *((engine, {}) for engine in ENGINES),
    ("fsdp", {"gradient_reduction": "step"}),
    ("zero1", {"offload": "optimizer"}),
    ("zero2", {"offload": "optimizer"}),
    ("zero3", {"offload": "optimizer"}),
    ("zero3", {"offload": "params"}),
]


@pytest.mark.parametrize("world", [1, 2])
def test_gradients_are_the_float32_sum_of_those_of_all_micro_batches(world: int) -> None:
    """A sum in bfloat16 misses by 0.003 after 8 micro-batches, and by more after more."""
    cases = [{"engine": engine, "keys": keys, "accumulation": 8} for engine, keys in CASES]
    (found, *_) = spawn(world, "tests.dist.precision:compare_gradients", cases)
    for case, result in zip(CASES, found, strict=True):
        assert result["error"] < 1e-6, (case, result)
        assert result["dtypes"] == ["torch.float32"], case
        assert result["told"] == pytest.approx(result["norm"], rel=1e-5), case


@pytest.mark.parametrize("world", [1, 2])
def test_every_engine_trains_float32_masters_by_the_bfloat16_model(world: int) -> None:
    """Blocks and experts see bfloat16 alone, and weights are those of a plain loop over a bfloat16 copy."""
    cases = [{"engine": e, "architecture": a, "steps": 3} for a in ARCHITECTURES for e in ENGINES]
    (found, *_) = spawn(world, "tests.dist.precision:compare_weights", cases)
    for case, result in zip(cases, found, strict=True):
        assert result["miss"] < 1e-5, (case, result)
        assert result["dtypes"] == ["torch.float32"], case
        assert result["flow"] == ["torch.bfloat16"], case
        if case["engine"] != "zero3":  # which keeps copies of gathered weights
            assert result["kept"] == pytest.approx(result["kept_plainly"], rel=0.02), (case, result)
