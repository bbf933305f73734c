"""A mixture of experts trains alike on every engine, world size and accumulation, balanced over the global batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dist_ft.testing import tiny
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import BATCH, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
AUX, Z, STEPS = 0.3, 0.01, 4
PARITY = {"rel": 1e-5}


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("mixture"), num_hidden_layers=2, initializer_range=0.3)


def train_plainly(folder: str, rows: list[dict], aux: float, z: float) -> list[tuple[float, float, float]]:
    """A loop over whole padded global batches: (loss of the tokens, gradient norm, transformers' balance loss)."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    decay = [{"params": [p for p in model.parameters() if p.ndim >= 2], "weight_decay": WEIGHT_DECAY}]
    optimizer = torch.optim.AdamW(
        [*decay, {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0}], foreach=False
    )
    curve = []
    for step in range(STEPS):
        batch = [rows[(step * BATCH + i) % len(rows)] for i in range(BATCH)]
        longest = max(len(row["input_ids"]) for row in batch)
        ids = torch.tensor([row["input_ids"] + [0] * (longest - len(row["input_ids"])) for row in batch])
        labels = torch.tensor([row["labels"] + [-100] * (longest - len(row["labels"])) for row in batch])
        mask = torch.tensor([[1] * len(r["input_ids"]) + [0] * (longest - len(r["input_ids"])) for r in batch])
        output = model(input_ids=ids, attention_mask=mask, output_router_logits=True)
        loss = functional.cross_entropy(output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        balance = load_balancing_loss_func(output.router_logits, 4, 2, mask)
        real = mask.flatten().bool()
        squares = torch.stack([g.reshape(-1, 4)[real].logsumexp(-1).square().mean() for g in output.router_logits])
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * (1 - step / STEPS)
        (loss + aux * balance + z * squares.mean()).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
        optimizer.step()
        optimizer.zero_grad()
        curve.append((loss.item(), norm.item(), balance.item()))
    return curve


def cases_of(folder: Path, world: int, mixture: str, data: str) -> dict[tuple, dict[str, Any]]:
    made = {}
    for engine, accumulation, aux in itertools.product(ENGINES, (1, 4), (0.0, AUX)):
        case = (engine, accumulation, aux)
        config = token_run(
            folder / "-".join(map(str, case)), mixture, data, engine, world, accumulation, False, {"name": "full"}
        )
        config["train"]["max_steps"] = STEPS
        config["moe"] = {"aux_loss_coef": aux, "z_loss_coef": Z if aux else 0.0}
        made[case] = config
    return made


@pytest.mark.parametrize("world", [1, 2])
def test_balanced_training_follows_transformers_over_the_global_batch(
    world: int, mixture: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    cases = cases_of(tmp_path, world, mixture, rows[0])
    spawn(world, "tests.dist.cases:run_cases", [{"config": c} for c in cases.values()], timeout_s=500)
    oracle = {aux: train_plainly(mixture, rows[1], aux, Z if aux else 0.0) for aux in (0.0, AUX)}
    assert oracle[0.0][-1][1] != pytest.approx(oracle[AUX][-1][1], rel=1e-2), "the losses should matter"
    for case, config in cases.items():
        metrics = metrics_of(Path(config["output_dir"]))
        told = [(m["train/loss"], m["train/grad_norm"], m["moe/aux_loss"]) for m in metrics]
        for step, (ours, theirs) in enumerate(zip(told, oracle[case[2]], strict=True), start=1):
            assert ours == pytest.approx(theirs, **PARITY), (case, step)


def test_ranks_that_use_different_experts_neither_hang_nor_differ() -> None:
    """Without leaf modules ZeRO-3 waits for ever here, without keep_in_graph DDP does."""
    cases = [{"engine": engine} for engine in ("ddp", "fsdp", "zero3")]
    alone = spawn(1, "tests.dist.separate:train_all", cases[:1], timeout_s=150)[0][0]
    for curves in spawn(2, "tests.dist.separate:train_all", cases, timeout_s=150):
        for case, curve in zip(cases, curves, strict=True):
            assert curve == pytest.approx(alone, **PARITY), case


def test_without_leaf_modules_zero3_fails() -> None:
    """The control of the test above: it can fail."""
    with pytest.raises(RuntimeError, match="exit codes"):
        spawn(2, "tests.dist.separate:train_all", [{"engine": "zero3", "leaf": False, "touch": False}], timeout_s=40)


@pytest.fixture(scope="session")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Fused experts of more than 100,000 elements: ZeRO-3 does not take smaller parameters apart."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 128, "num_experts": 8, "num_hidden_layers": 2}
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("wide"), **sizes, initializer_range=0.1)


LORA = {"name": "lora", "r": 2, "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
METHODS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "experts": (LORA, {"aux_loss_coef": AUX}),
    "experts-only": (LORA | {"target_modules": []}, {}),
    "router-trained": ({"name": "lora", "r": 2}, {"aux_loss_coef": AUX, "router": "train"}),
    "router-adapted": (LORA, {"aux_loss_coef": AUX, "router": "adapt"}),
    "full-frozen": ({"name": "full"}, {"router": "frozen", "aux_loss_coef": AUX, "z_loss_coef": Z}),
}


def test_methods_compose_with_experts_on_every_engine_with_recomputation(
    wide: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    curves: dict[tuple, list[float]] = {}
    for world in (1, 2):
        cases = {}
        for engine, name in itertools.product(ENGINES if world > 1 else ENGINES[:1], METHODS):
            method, moe = METHODS[name]
            folder = tmp_path / f"{world}-{engine}-{name}"
            config = token_run(folder, wide, rows[0], engine, world, 2, False, method)
            config["train"]["max_steps"] = STEPS
            config["moe"] = moe
            config["model"]["gradient_checkpointing"] = world > 1
            cases[world, engine, name] = config
        spawn(world, "tests.dist.cases:run_cases", [{"config": c} for c in cases.values()], timeout_s=200)
        for case, config in cases.items():
            metrics = metrics_of(Path(config["output_dir"]))
            curves[case] = [m[key] for m in metrics for key in ("train/loss", "train/grad_norm", "moe/aux_loss")]
            trained = set(torch.load(Path(config["output_dir"]) / "weights.pt", weights_only=True))
            routed = any(".gate." in key for key in trained)
            assert routed == (config["moe"].get("router") in ("train", "adapt")), (case, trained)
            assert any("experts" in key for key in trained) == (case[2] != "router-trained"), (case, trained)
    for case, curve in curves.items():
        assert curve == pytest.approx(curves[1, "ddp", case[2]], **PARITY), case


def test_every_rank_has_the_routers_buffers(rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    """DeepSeek-V3 chooses by a correction bias that is no parameter: one rank and two must route alike."""
    model: Any = tiny.build("deepseek_v3")
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.tensor([0.3, 0.3, -0.3, -0.3]))
    model.save_pretrained(tmp_path / "base")
    curves = {}
    for world in (1, 2):
        configs = {}
        for engine in ENGINES if world > 1 else ENGINES[:1]:
            folder = tmp_path / f"{world}-{engine}"
            config = token_run(folder, str(tmp_path / "base"), rows[0], engine, world, 1, False, {"name": "full"})
            config["train"]["max_steps"] = STEPS
            configs[world, engine] = config
        spawn(world, "tests.dist.cases:run_cases", [{"config": c} for c in configs.values()], timeout_s=120)
        for case, config in configs.items():
            metrics = metrics_of(Path(config["output_dir"]))
            curves[case] = [m[key] for m in metrics for key in ("train/loss", "train/grad_norm", "moe/load_max")]
    for case, curve in curves.items():
        assert curve == pytest.approx(curves[1, "ddp"], **PARITY), case
