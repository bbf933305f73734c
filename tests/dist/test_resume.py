"""A resumed run goes on as if never stopped: to the bit on the same topology, and on any other engine or size."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.checkpoint.reader import SafeReader
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import STEPS, token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STOP = 11
METHODS = {"full": {"name": "full"}, "lora": {"name": "lora", "r": 4, "lora_dropout": 0.2}}


def case(folder: Path, model: str, data: str, engine: str, world: int, method: str, **more: Any) -> dict[str, Any]:
    config = token_run(folder, model, data, engine, world, 2, True, METHODS[method])
    config["data"]["shuffle"] = True
    config["train"]["seed"] = 3
    if method == "lora":  # with every kind of random draw inside the model
        config["train"]["neftune_noise_alpha"] = 5.0
    return {"config": config, **more}


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return torch.load(folder / "weights.pt", weights_only=True)


def run(world: int, cases: list[dict[str, Any]]) -> list[Any]:
    return spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)


@pytest.mark.parametrize("method", METHODS)
def test_same_topology_same_bits(method: str, model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    whole = [case(tmp_path / f"{e}-whole", model, rows[0], e, 2, method) for e in ENGINES]
    halves = [case(tmp_path / f"{e}-halves", model, rows[0], e, 2, method, stop_after=STOP) for e in ENGINES]
    rests = [case(tmp_path / f"{e}-halves", model, rows[0], e, 2, method) for e in ENGINES]
    run(2, whole + halves + rests)
    for engine in ENGINES:
        one, two = tmp_path / f"{engine}-whole", tmp_path / f"{engine}-halves"
        expected, got = metrics_of(one), metrics_of(two)
        assert [m["step"] for m in got] == list(range(1, STEPS + 1)), engine
        for key in ("train/loss", "train/grad_norm", "train/learning_rate", "train/supervised_tokens", "epoch"):
            assert [m[key] for m in got] == [m[key] for m in expected], (engine, key)
        resumed, straight = weights_of(two), weights_of(one)
        assert set(resumed) == set(straight)
        assert all(torch.equal(resumed[name], straight[name]) for name in straight), engine


def test_other_engine_and_size_same_curve(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    start = tmp_path / "start"
    run(2, [case(start, model, rows[0], "zero3", 2, "full", stop_after=STOP)])
    run(1, [case(tmp_path / "whole", model, rows[0], "ddp", 1, "full")])
    expected = [v for m in metrics_of(tmp_path / "whole") for v in (m["train/loss"], m["train/grad_norm"])]
    for world in (1, 2):
        cases = []
        for engine in ENGINES:
            folder = tmp_path / f"{engine}-{world}"
            shutil.copytree(start, folder, symlinks=True)
            cases.append(case(folder, model, rows[0], engine, world, "full"))
        run(world, cases)
        for engine in ENGINES:
            got = [
                v for m in metrics_of(tmp_path / f"{engine}-{world}") for v in (m["train/loss"], m["train/grad_norm"])
            ]
            assert got == pytest.approx(expected, rel=1e-5), (engine, world)


def test_a_torn_checkpoint_is_named_and_the_older_one_used(
    model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    folder = tmp_path / "torn"
    first = case(folder, model, rows[0], "fsdp", 2, "lora", stop_after=STOP)
    first["config"]["train"]["save_steps"] = 4
    run(2, [first])
    newest = folder / "checkpoints" / f"step-{STOP}"
    shard = next(newest.glob("__1_*.distcp"))
    shard.write_bytes(shard.read_bytes()[:-7])
    rest = case(folder, model, rows[0], "fsdp", 2, "lora")
    (result, _) = run(2, [rest])
    assert result[0]["step"] == STEPS
    straight = case(tmp_path / "straight", model, rows[0], "fsdp", 2, "lora")
    run(2, [straight])
    assert [m["train/loss"] for m in metrics_of(folder)] == [m["train/loss"] for m in metrics_of(tmp_path / "straight")]


def test_only_what_learns_is_saved(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    run(2, [case(tmp_path / "lora", model, rows[0], "zero2", 2, "lora", stop_after=2)])
    metadata = SafeReader(tmp_path / "lora" / "checkpoints" / "step-2").read_metadata()
    shapes = {name: tuple(entry.size) for name, entry in metadata.state_dict_metadata.items()}
    trained = {name: tuple(tensor.shape) for name, tensor in weights_of(tmp_path / "lora").items()}
    parts = ("model", "exp_avg", "exp_avg_sq")
    assert shapes == {f"{part}/{name}": shape for part in parts for name, shape in trained.items()}
    assert all("lora_" in name for name in trained)
