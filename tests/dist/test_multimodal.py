"""A multimodal model trained on text alone: the curve of the plain loop on every engine; what text misses stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Gemma3ForConditionalGeneration

from dist_ft.model.reach import lies_in
from dist_ft.testing.spawn import spawn
from tests import multimodal
from tests.dist.cases import metrics_of
from tests.dist.oracle import steps_of, train_plainly
from tests.runs import BATCH, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

STEPS = 4  # DDP ends in the second if a trained parameter is left without a gradient
ENGINES = ("ddp", "fsdp", "zero1", "zero3")
IDLE = multimodal.IDLE["gemma3"]
METHODS: dict[str, dict[str, Any]] = {"full": {"name": "full"}, "lora": {"name": "lora", "r": 4}}


@pytest.fixture(scope="module")
def gemma3(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("gemma3")
    multimodal.build("gemma3").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(
    gemma3: str, rows: tuple[str, list[dict]], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str, int], Path]:
    top, folders = tmp_path_factory.mktemp("multimodal"), {}
    for world in (1, 2):
        cases = []
        for method, engine in ((m, e) for m in METHODS for e in (ENGINES if world == 2 else ("ddp",))):
            folder = folders[method, engine, world] = top / f"{method}-{engine}-{world}"
            config = token_run(folder, gemma3, rows[0], engine, world, 2, False, METHODS[method])
            config["train"]["max_steps"] = STEPS
            cases.append({"config": config, "export": True})
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)
    return folders


def test_full_fine_tuning_follows_the_plain_loop(
    gemma3: str, rows: tuple[str, list[dict]], runs: dict[tuple[str, str, int], Path]
) -> None:
    steps = steps_of(rows[1], batch=BATCH, steps=STEPS, max_length=None)
    losses, norms, weights = train_plainly(
        gemma3, steps, learning_rate=LEARNING_RATE, weight_decay=WEIGHT_DECAY, max_norm=MAX_NORM
    )
    for (method, engine, world), folder in runs.items():
        if method != "full":
            continue
        metrics = metrics_of(folder)
        assert [m["train/loss"] for m in metrics] == pytest.approx(losses, rel=1e-5), (engine, world)
        assert [m["train/grad_norm"] for m in metrics] == pytest.approx(norms, rel=1e-5), (engine, world)
        trained = torch.load(folder / "weights.pt", weights_only=True)
        assert set(trained) == {name for name in weights if not lies_in(name, IDLE)}, (engine, world)
        loaded = dict(Gemma3ForConditionalGeneration.from_pretrained(folder / "model").named_parameters())
        before = dict(Gemma3ForConditionalGeneration.from_pretrained(gemma3).named_parameters())
        for name, tensor in weights.items():
            torch.testing.assert_close(loaded[name].detach(), tensor, rtol=0, atol=1e-4, msg=f"{engine} {name}")
            assert torch.equal(loaded[name], before[name]) == lies_in(name, IDLE), (engine, name)


def test_lora_is_the_same_on_every_engine(runs: dict[tuple[str, str, int], Path]) -> None:
    def curve(folder: Path) -> list[float]:
        return [v for m in metrics_of(folder) for v in (m["train/loss"], m["train/grad_norm"])]

    for (method, engine, world), folder in runs.items():
        if method != "lora":
            continue
        assert curve(folder) == pytest.approx(curve(runs["lora", "ddp", 1]), rel=1e-5), (engine, world)
        trained = torch.load(folder / "weights.pt", weights_only=True)
        assert len(trained) == 3 * 7 * 2 and all(".language_model." in name for name in trained), (engine, world)
