"""A private run is the same under DDP and FSDP2 on any world and micro-batch, and goes on as if never stopped."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from opacus.accountants import RDPAccountant

from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import save_model
from tests.dist.cases import metrics_of
from tests.runs import labelled_run, token_run
from tests.samples import write_labelled_rows

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4},
    "qlora": {"name": "qlora", "r": 4},
}
PRIVACY = {"noise_multiplier": 0.7, "max_grad_norm": 0.3, "delta": 1e-3, "noise_seed": 7}
ENGINES = ("ddp", "fsdp")
STEPS, STOP = 5, 3


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


class Cases:
    """Runs by `KIND-METHOD`, engine and world; each in a folder of its own unless it goes on in another's."""

    def __init__(self, model: str, rows: str, folder: Path) -> None:
        self.model, self.rows, self.folder = model, rows, folder
        self.labelled = folder / "labelled.jsonl"
        write_labelled_rows(self.labelled)
        self.bert = save_model("bert", folder / "bert")

    def case(self, kind: str, engine: str, world: int, *, at: str = "", stop: int | None = None) -> dict[str, Any]:
        shape, method = kind.split("-")
        folder = self.folder / (at or f"{kind}-{engine}-{world}")
        if shape == "llama":
            config = token_run(folder, self.model, self.rows, engine, world, 2, False, METHODS[method])
            del config["data"]["shuffle"], config["optim"]["max_grad_norm"]
            config["model"]["quantization"] = "nf4" if method == "qlora" else "none"
        else:
            config = labelled_run(folder, self.bert, self.labelled, engine, world, method=METHODS[method])
            config["task"].pop("class_weights")
            config["data"].pop("validation")
        config["privacy"] = {**PRIVACY, "grad_sample_mode": "auto" if world == 2 else "loop"}
        batch, micro = (2, 1) if shape == "rare" else (8, 8 // world**2)
        config["train"] |= {"max_steps": STEPS, "global_batch_size": batch, "per_device_train_batch_size": micro}
        return {"config": config, **({"stop_after": stop} if stop else {})}

    def run(self, world: int, *cases: dict[str, Any]) -> list[bool]:
        """Train; whether rows went one by one on rank 0, by case."""
        results = spawn(world, "tests.dist.private_cases:run_and_look", list(cases), timeout_s=280)
        return [bool(looped) for looped in results[0]]


def test_any_engine_world_and_micro_batch_and_a_stop_give_the_same_private_run(
    model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    cases, kinds = Cases(model, rows[0], tmp_path), ["llama-full", "llama-lora", "rare-full", "llama-qlora"]
    resumed = kinds[:2]
    cases.run(1, *(cases.case(kind, engine, 1) for kind in kinds for engine in ENGINES))
    both = [cases.case(kind, engine, 2) for kind in kinds for engine in ENGINES]
    halves = [
        cases.case(kind, engine, 2, at=f"{kind}-{engine}-stopped", stop=stop)
        for stop in (STOP, None)
        for kind in resumed
        for engine in ENGINES
    ]
    crossed = [
        cases.case("llama-full", engine, 2, at=f"from-{first}", stop=stop)
        for first, second in (ENGINES, ENGINES[::-1])
        for engine, stop in ((first, STOP), (second, None))
    ]
    wrong = [{**cases.case("llama-full", engine, 2, at=f"wrong-{engine}"), "wrong_on": 1} for engine in ENGINES]
    looped = cases.run(2, *both, *halves, *crossed, *wrong)
    assert looped == [False] * (len(looped) - 1) + [True], "FSDP2's ranks give up together, DDP's each for itself"
    for kind in kinds:
        for engine in ENGINES:
            assert_alike(tmp_path / f"{kind}-ddp-1", tmp_path / f"{kind}-{engine}-1", rel=1e-5)
            assert_alike(tmp_path / f"{kind}-ddp-1", tmp_path / f"{kind}-{engine}-2", rel=1e-5)
            if kind in resumed:
                assert_alike(tmp_path / f"{kind}-{engine}-2", tmp_path / f"{kind}-{engine}-stopped", rel=0)
    for first in ENGINES:
        assert_alike(tmp_path / "llama-full-ddp-1", tmp_path / f"from-{first}", rel=1e-5)
        assert_alike(tmp_path / "llama-full-ddp-1", tmp_path / f"wrong-{first}", rel=1e-5)
    targets = [m["train/supervised_tokens"] for m in metrics_of(tmp_path / "rare-full-fsdp-2")]
    assert 0 in targets and max(targets) > 0, "some steps have no rows"
    accountant = RDPAccountant()
    for metrics in metrics_of(tmp_path / "llama-full-fsdp-stopped"):
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
