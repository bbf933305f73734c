"""A mixture of experts trains alike on every engine, world size and accumulation, balanced over the global batch."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.conftest import BATCH, LEARNING_RATE, MAX_NORM, VOCAB, WEIGHT_DECAY, config_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
AUX, Z, STEPS = 0.3, 0.01, 4
PARITY = {"rel": 1e-5}


@pytest.fixture(scope="session")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("mixture")
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        hidden_size=16, intermediate_size=24, moe_intermediate_size=8, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=8, num_experts=4, num_experts_per_tok=2, vocab_size=VOCAB, pad_token_id=0,
        max_position_embeddings=64, initializer_range=0.3,
    )  # fmt: skip
    Qwen3MoeForCausalLM(config).save_pretrained(folder)
    return str(folder)


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
        config = config_of(
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
    spawn(world, "tests.dist.cases:run_cases", [{"config": c} for c in cases.values()], timeout_s=250)
    oracle = {aux: train_plainly(mixture, rows[1], aux, Z if aux else 0.0) for aux in (0.0, AUX)}
    assert oracle[0.0][-1][1] != pytest.approx(oracle[AUX][-1][1], rel=1e-2), "the losses should matter"
    for case, config in cases.items():
        metrics = metrics_of(Path(config["output_dir"]))
        told = [(m["train/loss"], m["train/grad_norm"], m["moe/aux_loss"]) for m in metrics]
        for step, (ours, theirs) in enumerate(zip(told, oracle[case[2]], strict=True), start=1):
            assert ours == pytest.approx(theirs, **PARITY), (case, step)
