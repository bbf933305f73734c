"""A private run is the same on any world size and micro-batch, and goes on as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant

from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.conftest import config_of
from tests.dist.heads import config_of as heads_config_of
from tests.dist.heads import make_model, make_rows

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

METHODS: dict[str, dict[str, Any]] = {"full": {"name": "full"}, "lora": {"name": "lora", "r": 4}}
PRIVACY = {"noise_multiplier": 0.7, "max_grad_norm": 0.3, "delta": 1e-3, "noise_seed": 7}
STEPS, STOP = 5, 3


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def test_any_world_and_micro_batch_and_a_stop_give_the_same_private_run(
    model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    data = tmp_path / "labelled.jsonl"
    make_rows(data)
    bert = make_model("bert", tmp_path / "bert")

    def case(kind: str, world: int, **more: Any) -> dict[str, Any]:
        shape, method = kind.split("-")
        folder = tmp_path / f"{kind}-{world}{'-stopped' if 'stopped' in more else ''}"
        if shape == "llama":
            config = config_of(folder, model, rows[0], "ddp", world, 2, False, METHODS[method])
            del config["data"]["shuffle"], config["optim"]["max_grad_norm"]
        else:
            config = heads_config_of(folder, bert, data, "ddp", world, method=METHODS[method])
            config["task"].pop("class_weights")
            config["data"].pop("validation")
        config["privacy"] = {**PRIVACY, "grad_sample_mode": "auto" if world == 2 else "loop"}
        batch, micro = (2, 1) if shape == "rare" else (8, 8 // world**2)
        config["train"] |= {"max_steps": STEPS, "global_batch_size": batch, "per_device_train_batch_size": micro}
        return {"config": config, **({"stop_after": more["stopped"]} if more.get("stopped") else {})}

    kinds = ["llama-full", "llama-lora", "rare-full"]
    resumed = kinds[:2]
    spawn(1, "tests.dist.cases:run_cases", [case(kind, 1) for kind in kinds], timeout_s=200)
    cases = [case(kind, 2) for kind in kinds]
    cases += [case(kind, 2, stopped=STOP) for kind in resumed] + [case(kind, 2, stopped=None) for kind in resumed]
    spawn(2, "tests.dist.cases:run_cases", cases, timeout_s=200)
    for kind in kinds:
        alone, both, halves = (tmp_path / f"{kind}-{name}" for name in ("1", "2", "2-stopped"))
        assert_alike(alone, both, rel=1e-5)
        if kind in resumed:
            assert_alike(both, halves, rel=0)
    targets = [m["train/supervised_tokens"] for m in metrics_of(tmp_path / "rare-full-1")]
    assert 0 in targets and max(targets) > 0, "some steps have no rows"
    accountant = RDPAccountant()
    for metrics in metrics_of(tmp_path / "llama-full-2-stopped"):
        accountant.step(noise_multiplier=0.7, sample_rate=8 / 37)
        assert metrics["train/epsilon"] == pytest.approx(accountant.get_epsilon(delta=1e-3), rel=1e-9)


def assert_alike(one: Path, other: Path, *, rel: float) -> None:
    keys = ("train/loss", "train/grad_norm", "train/supervised_tokens", "train/epsilon", "epoch")
    curves = [[[m[key] for key in keys] for m in metrics_of(folder)] for folder in (one, other)]
    assert len(curves[0]) == len(curves[1]) == STEPS, json.dumps(curves)
    for step, (expected, got) in enumerate(zip(*curves, strict=True), start=1):
        assert got == pytest.approx(expected, rel=rel, abs=0), (other.name, step)
    expected_weights = weights_of(one)
    for name, got_weight in weights_of(other).items():
        assert torch.allclose(got_weight, expected_weights[name], rtol=rel, atol=rel), (other.name, name)
