"""A run over a folder in FP8 is the run over the same weights dequantized, on one process and on two."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.testing.spawn import spawn
from tests.dist.outcomes import curve
from tests.runs import token_run
from tests.stored import save_fp8

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

METHODS: dict[str, dict[str, Any]] = {"full": {"name": "full"}, "lora": {"name": "lora", "r": 4}}


@pytest.mark.parametrize("world", [1, 2])
def test_a_folder_in_fp8_trains_as_the_plain_one(world: int, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    folders = dict(zip(("plain", "fp8"), save_fp8("qwen3_moe", tmp_path / "models"), strict=True))
    runs, cases = {}, []
    for method, engine in (("full", "fsdp"), ("lora", "ddp")):
        for kind, model in folders.items():
            runs[method, kind] = folder = tmp_path / f"{method}-{kind}"
            config = token_run(folder, model, rows[0], engine, world, 1, False, METHODS[method])
            config["train"]["max_steps"] = 3
            cases.append({"config": config, "export": True})
    spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)
    for method in METHODS:
        plain, packed = runs[method, "plain"], runs[method, "fp8"]
        assert curve(packed) == pytest.approx(curve(plain), rel=1e-6), method
        one, two = (torch.load(run / "all_weights.pt", weights_only=True) for run in (plain, packed))
        assert {n: t.dtype for n, t in one.items()} == {n: t.dtype for n, t in two.items()}
    config = json.loads((runs["full", "fp8"] / "model" / "config.json").read_text())
    assert "quantization_config" not in config
    assert "FineGrainedFP8Config(dequantize=True)" in (runs["lora", "fp8"] / "model" / "README.md").read_text()
