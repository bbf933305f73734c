"""The same curve on every engine, world size, accumulation and packing as in a plain PyTorch loop."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.oracle import steps_of, train_plainly
from tests.runs import BATCH, LEARNING_RATE, MAX_LENGTH, MAX_NORM, STEPS, WEIGHT_DECAY, token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
PARITY = {"rel": 1e-5}


def run_matrix(folder: Path, world: int, cases: list[tuple], make: Any) -> dict[tuple, Path]:
    configs = {case: make(folder / "-".join(map(str, case)), *case) for case in cases}
    spawn(world, "tests.dist.cases:run_cases", [{"config": c} for c in configs.values()], timeout_s=800)
    return {case: Path(config["output_dir"]) for case, config in configs.items()}


@pytest.fixture(scope="module")
def oracle(model: str, rows: tuple[str, list[dict]]) -> dict[bool, Any]:
    return {
        packing: train_plainly(
            model,
            steps_of(rows[1], batch=BATCH, steps=STEPS, max_length=MAX_LENGTH if packing else None),
            learning_rate=LEARNING_RATE,
            weight_decay=WEIGHT_DECAY,
            max_norm=MAX_NORM,
        )
        for packing in (False, True)
    }


@pytest.mark.parametrize("world", [1, 2])
def test_full_fine_tuning_follows_the_plain_loop(
    world: int, model: str, rows: tuple[str, list[dict]], oracle: dict[bool, Any], tmp_path: Path
) -> None:
    cases = [(e, a, p) for e, a, p in itertools.product(ENGINES, (1, 4), (False, True))]
    runs = run_matrix(
        tmp_path,
        world,
        cases,
        lambda out, engine, accumulation, packing: token_run(
            out, model, rows[0], engine, world, accumulation, packing, {"name": "full"}
        ),
    )
    for case, run_dir in runs.items():
        losses, norms, weights = oracle[case[2]]
        metrics = metrics_of(run_dir)
        assert [m["step"] for m in metrics] == list(range(1, STEPS + 1)), case
        assert [m["train/loss"] for m in metrics] == pytest.approx(losses, **PARITY), case
        assert [m["train/grad_norm"] for m in metrics] == pytest.approx(norms, **PARITY), case
        trained = torch.load(run_dir / "weights.pt", weights_only=True)
        assert set(trained) == set(weights), case
        for name, tensor in weights.items():
            torch.testing.assert_close(trained[name], tensor, rtol=0, atol=1e-4, msg=f"{case} {name}")


def test_lora_is_the_same_on_every_engine(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    method = {"name": "lora", "r": 4, "use_dora": True}
    curves: dict[tuple, list[float]] = {}
    for world in (1, 2):
        runs = run_matrix(
            tmp_path / str(world),
            world,
            [(engine, 2, True) for engine in ENGINES],
            lambda out, engine, accumulation, packing, world=world: token_run(
                out, model, rows[0], engine, world, accumulation, packing, method
            ),
        )
        for case, run_dir in runs.items():
            curves[(world, *case)] = [v for m in metrics_of(run_dir) for v in (m["train/loss"], m["train/grad_norm"])]
    reference = curves[1, "ddp", 2, True]
    assert reference[0] != pytest.approx(reference[-2], rel=1e-3), "nothing was learned"
    for case, curve in curves.items():
        assert curve == pytest.approx(reference, **PARITY), case


def test_saving_memory_changes_no_number(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    offloaded = [("fsdp", "params"), ("zero1", "optimizer"), ("zero2", "optimizer"), ("zero3", "params")]
    cases = [("ddp", "none"), *offloaded, *((engine, "recompute") for engine in ENGINES)]

    def make(out: Path, engine: str, offload: str) -> dict[str, Any]:
        config = token_run(out, model, rows[0], engine, 2, 2, False, {"name": "full"})
        if offload == "recompute":
            config["model"]["gradient_checkpointing"] = True
        elif engine != "ddp":
            config["engine"]["offload"] = offload
        return config

    runs = run_matrix(tmp_path, 2, cases, make)
    curves = {
        case: [v for m in metrics_of(folder) for v in (m["train/loss"], m["train/grad_norm"])]
        for case, folder in runs.items()
    }
    for case, curve in curves.items():
        assert curve == pytest.approx(curves["ddp", "none"], **PARITY), case


def test_bfloat16_stays_near_float32(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    def make(out: Path, engine: str, dtype: str) -> dict[str, Any]:
        config = token_run(out, model, rows[0], engine, 2, 2, True, {"name": "full"})
        config["model"]["dtype"] = dtype
        return config

    cases = [("ddp", "float32"), *((engine, "bfloat16") for engine in ENGINES)]
    runs = run_matrix(tmp_path, 2, cases, make)
    expected = [m["train/loss"] for m in metrics_of(runs["ddp", "float32"])]
    for case in cases[1:]:
        losses = [m["train/loss"] for m in metrics_of(runs[case])]
        assert losses == pytest.approx(expected, rel=3e-3), case
        assert losses != expected, "bfloat16 was not used"
        weights = torch.load(runs[case] / "weights.pt", weights_only=True)
        assert {tensor.dtype for tensor in weights.values()} == {torch.float32}, "master weights are float32"


def test_position_frequencies_keep_their_precision(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    def make(name: str, dtype: str) -> dict[str, Any]:
        config = token_run(tmp_path / name, model, rows[0], name, 1, 1, False, {"name": "full"})
        config["model"]["dtype"] = dtype
        return config

    configs = [make("ddp", "float32"), *(make(engine, "bfloat16") for engine in ENGINES[1:])]
    (exact, *others) = spawn(1, "tests.dist.cases:buffers_after_setup", configs)[0]
    assert exact and all(other == exact for other in others)


def test_zero_compiles_nothing(model: str, rows: tuple[str, list[dict]], tmp_path: Path, monkeypatch) -> None:
    """A build that was killed leaves a lock behind, at which every later run would wait for ever."""
    lock = tmp_path / "extensions" / "deepspeed_shm_comm" / "lock"
    lock.parent.mkdir(parents=True)
    lock.touch()
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path / "extensions"))

    def make(folder: Path, engine: str) -> dict[str, Any]:
        return token_run(folder, model, rows[0], engine, 2, 2, False, {"name": "full"})

    run_matrix(tmp_path, 2, [("zero2",), ("zero3",)], make)
    assert [path for path in (tmp_path / "extensions").rglob("*") if path.is_file()] == [lock]
