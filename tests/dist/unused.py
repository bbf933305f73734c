"""A model of which some batches use only a part, trained by DDP and by a plain loop."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from dist_ft.engine.ddp import Ddp
from dist_ft.model.anatomy import find_anatomy
from dist_ft.process.place import Place
from dist_ft.state import Batch, BuiltModel, LossSum
from tests.dist.precision import CPU

WIDTH, STEPS, ACCUMULATION = 6, 4, 2


class Partly(nn.Module):
    """Layers of which a batch uses the first, the last and those that it asks for."""

    def __init__(self) -> None:
        super().__init__()
        self.tower = nn.Linear(WIDTH, WIDTH)  # which no text uses; the first, as a vision tower would be
        self.first = nn.Linear(WIDTH, WIDTH)
        self.extra = nn.Linear(WIDTH, WIDTH)
        self.last = nn.Linear(WIDTH, 1)

    def forward(self, x: Tensor, extra: bool, tower: bool) -> Tensor:
        x = self.first(self.tower(x) if tower else x).tanh()
        result: Tensor = self.last(x + self.extra(x) if extra else x)
        return result


def batch_of(rank: int, step: int, index: int, dtype: torch.dtype, used: str) -> Batch:
    """`used` says which batches use the extra layer: all, those of rank 1, some after the first step, or none.

    With `whole`, all batches use all layers.
    """
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(100 * step + 10 * rank + index)).to(dtype)
    extra = {
        "whole": True,
        "all": True,
        "rank": rank == 1,
        "later": step > 0 and (rank + step) % 2 == 1,
        "none": False,
    }[used]
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch({"x": x, "extra": extra, "tower": used == "whole"}, empty, empty, empty, 3)


def loss(model: nn.Module, batch: Batch) -> LossSum:
    return LossSum(model(**batch.inputs).float().square().sum(), torch.tensor(3.0))


def train_plainly(dtype: torch.dtype, world: int, used: str) -> dict[str, Tensor]:
    """All micro-batches of all ranks in one process; a parameter without a gradient is not updated."""
    model = make_model()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2, weight_decay=0.5)
    for step in range(STEPS):
        for rank in range(world):
            for index in range(ACCUMULATION):
                half = copy.deepcopy(model).to(dtype)
                result = loss(half, batch_of(rank, step, index, dtype, used)).loss / (3.0 * ACCUMULATION)
                given = torch.autograd.grad(result, list(half.parameters()), allow_unused=True)
                for parameter, part in zip(model.parameters(), given, strict=True):
                    if part is not None:
                        before = 0.0 if parameter.grad is None else parameter.grad
                        parameter.grad = before + part.float() / world
        optimizer.step()
        optimizer.zero_grad()
    return {name: p.detach() for name, p in model.named_parameters()}


def make_model() -> Partly:
    torch.manual_seed(0)
    model = Partly()
    return model.bfloat16().float()  # type: ignore[no-any-return]


def train_all(place: Place, cases: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Of each case: how far DDP's weights are from the plain loop's, what it said, and what the tower has become."""
    found = []
    for case in cases:
        dtype, used = getattr(torch, case["dtype"]), case["used"]
        expected = train_plainly(dtype, place.world_size, used)
        model = make_model() if place.is_main else Partly()
        engine = Ddp(device=CPU, place=place, dtype=dtype, max_grad_norm=0.0)
        engine.setup(
            BuiltModel(model, find_anatomy(model)),
            lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2, weight_decay=0.5),
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            for step in range(STEPS):
                for index in range(ACCUMULATION):
                    micro = batch_of(place.rank, step, index, dtype, used)
                    denominator = torch.tensor(3.0 * ACCUMULATION * place.world_size)
                    engine.forward_backward(micro, loss, denominator, last=index == ACCUMULATION - 1)
                engine.step(1e-2)
        got = {name: tensor.clone() for name, tensor in engine.weights(trainable=True)}
        found.append(
            {
                "miss": max(float((got[name] - weight).abs().max()) for name, weight in expected.items()),
                "same": torch.equal(got["tower.weight"], make_model().tower.weight.detach()),
                "told": [str(w.message) for w in told if "not used by the first batch" in str(w.message)],
                "updates": engine.state().updates,
                "module": type(engine.module).__name__,
            }
        )
    return found
