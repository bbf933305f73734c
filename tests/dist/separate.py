"""A model whose experts are modules of their own, and data that sends each rank's tokens to other experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.config.engine import FsdpConfig, Zero3Config
from dist_ft.engine import deepspeed as zero
from dist_ft.engine.ddp import Ddp
from dist_ft.engine.fsdp import Fsdp
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.moe.policy import keep_in_graph
from dist_ft.process.place import Place
from dist_ft.state import Batch, BuiltModel, LossSum

WIDTH, EXPERTS, LAYERS, STEPS = 320, 4, 2, 3  # 320 x 320 is above the size that ZeRO-3 never takes apart


class Experts(nn.Module):
    """Tokens of which feature e is the largest go to expert e, and to none else."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, EXPERTS, bias=False)
        self.gate.weight.data = torch.eye(EXPERTS, WIDTH)
        self.experts = nn.ModuleList(nn.Linear(WIDTH, WIDTH) for _ in range(EXPERTS))

    def forward(self, x: Tensor) -> Tensor:
        scores = self.gate(x).softmax(dim=-1)
        chosen = scores.argmax(dim=-1)
        out = torch.zeros_like(x)
        for expert in chosen.unique().tolist():
            at = (chosen == expert).nonzero().flatten()
            out = out.index_add(0, at, self.experts[expert](x[at]) * scores[at, expert, None])
        return out


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mixture = Experts()

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * self.mixture(x)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.ones(WIDTH))
        self.layers = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x: Tensor) -> Tensor:
        x = x * self.embedding
        for layer in self.layers:
            x = layer(x)
        return x


def batch_of(rank: int, step: int) -> Batch:
    """Two tokens, both for expert `rank + step`."""
    x = torch.randn(2, WIDTH, generator=torch.Generator().manual_seed(10 * step + rank))
    x[:, (rank + step) % EXPERTS] = 9.0
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch({"x": x}, empty, empty, empty, 2)


def loss(model: nn.Module, batch: Batch) -> LossSum:
    return LossSum(model(batch.inputs["x"]).square().sum(), torch.tensor(2.0))


def train(place: Place, case: dict[str, Any]) -> list[float]:
    """Gradient norms of a few steps and, last, the norm of all weights."""
    options = {"device": torch.device("cpu"), "place": place, "dtype": torch.float32, "max_grad_norm": 1.0}
    engine: Any = {
        "ddp": lambda: Ddp(**options),
        "fsdp": lambda: Fsdp(FsdpConfig(name="fsdp"), **options),
        "zero3": lambda: zero.Zero(Zero3Config(name="zero3"), micro_batch_size=2, accumulation_steps=1, **options),
    }[case["engine"]]()
    torch.manual_seed(0)
    model = Model()
    anatomy = find_anatomy(model)
    if case.get("touch", True):
        keep_in_graph(anatomy)
    if not case.get("leaf", True):
        anatomy = replace(anatomy, mixtures=())
    engine.setup(BuiltModel(model, anatomy), lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-3))
    found = []
    for step in range(STEPS):
        batches = [batch_of(place.rank, step)] if place.world_size > 1 else [batch_of(0, step), batch_of(1, step)]
        for i, batch in enumerate(batches, start=1):
            engine.forward_backward(batch, loss, torch.tensor(4.0), last=i == len(batches))
        found.append(engine.step(1e-3).grad_norm)
    weights = [tensor.detach().double().norm() for _, tensor in engine.weights(trainable=True)]
    return [*found, float(torch.stack(weights).norm())]


def train_all(place: Place, cases: list[dict[str, Any]]) -> list[list[float]]:
    return [train(place, case) for case in cases]
