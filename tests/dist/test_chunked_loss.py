"""Losses in chunks give the same curve and weights as all logits at once, on every engine."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

FULL: dict[str, Any] = {"name": "full"}
ADAPTED = {"name": "lora", "r": 2, "target_modules": ["q_proj", "lm_head"]}
FROZEN = {"name": "lora", "r": 2, "target_modules": ["q_proj"]}  # gradients are computed in the forward
ENGINES = ("ddp", "fsdp", "zero2", "zero3")
# one rank has more micro-batches with targets than the other; zero3 computes adapted heads at once
CASES = {
    **{(engine, "full"): FULL for engine in ENGINES},
    **{(engine, "frozen"): FROZEN for engine in ENGINES},
    **{(engine, "adapted"): ADAPTED for engine in ("fsdp", "zero2")},
}


def test_chunks_change_nothing(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    configs = {
        (engine, head, chunked): token_run(
            tmp_path / f"{engine}-{head}-{chunked}", model, rows[0], engine, 2, 2, False, method
        )
        for (engine, head), method in CASES.items()
        for chunked in (False, True)
    }
    for (_, _, chunked), config in configs.items():
        config["train"]["chunked_loss"] = chunked
    spawn(2, "tests.dist.chunks:run_in_chunks", [{"config": c} for c in configs.values()], timeout_s=500)
    for engine, head in CASES:
        folders = [Path(configs[engine, head, chunked]["output_dir"]) for chunked in (False, True)]
        plain, chunked = ([(m["train/loss"], m["train/grad_norm"]) for m in metrics_of(f)] for f in folders)
        assert len(plain) > 1 and len({loss for loss, _ in plain}) == len(plain)
        for one, other in zip(plain, chunked, strict=True):
            assert other == pytest.approx(one, rel=1e-5), (engine, head)
        weights = [torch.load(folder / "weights.pt", weights_only=True) for folder in folders]
        for name, tensor in weights[0].items():
            torch.testing.assert_close(weights[1][name], tensor, rtol=0, atol=1e-4, msg=f"{engine} {head} {name}")
