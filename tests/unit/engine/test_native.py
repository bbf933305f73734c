"""Tests of the state that engines over torch's own optimizers keep, by fake tensors of a GPU where there is none."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from dist_ft.config.optim import OptimConfig
from dist_ft.engine.ddp import Ddp
from dist_ft.engine.native import zero_moments
from dist_ft.model.anatomy import find_anatomy
from dist_ft.optim.adamw import build_adamw
from dist_ft.process.place import Place
from dist_ft.state import Batch, BuiltModel, LossSum

GPU = torch.device("cuda", 0)


class Placed(Ddp):
    """With a model that is on its device already: fake parameters cannot be moved."""

    def wrap(self, built: BuiltModel) -> nn.Module:
        return built.model


def make_engine(device: torch.device, dtype: torch.dtype, *, fused: bool) -> Ddp:
    """An engine over two layers, none of which was updated yet."""
    engine = Placed(device=device, place=Place(), dtype=dtype, max_grad_norm=1.0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    if device.type != "cpu":  # fake tensors have no values to initialize
        for layer in model:
            for name, parameter in list(layer.named_parameters()):
                setattr(layer, name, nn.Parameter(torch.empty(parameter.shape, device=device)))
    built = BuiltModel(model, find_anatomy(model))
    engine.setup(built, lambda named: build_adamw(OptimConfig(learning_rate=1e-2), named, fused=fused))
    return engine


def forms(state: dict[str, Any]) -> dict[str, tuple[torch.device, torch.dtype, torch.Size]]:
    return {name: (value.device, value.dtype, value.shape) for name, value in state.items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("fused", [True, False])
def test_a_state_before_the_first_update_is_what_adamw_itself_makes_on_a_gpu(dtype: torch.dtype, fused: bool) -> None:
    """A fused update refuses a count of updates that is on another device than the parameter."""
    with FakeTensorMode():
        engine = make_engine(GPU, dtype, fused=fused)
        engine.state()
        loaded = [forms(engine.optimizer.state[master]) for _, master in engine.masters]
        other = make_engine(GPU, dtype, fused=fused)
        for _, master in other.masters:
            master.grad = torch.zeros_like(master)
        other.optimizer.step()
        assert loaded == [forms(other.optimizer.state[master]) for _, master in other.masters]
        assert all(state["step"][0] == (GPU if fused else torch.device("cpu")) for state in loaded)
        assert all(state[moment][0] == GPU for state in loaded for moment in ("exp_avg", "exp_avg_sq"))
        assert {tensor.device for tensor in engine.state().tensors.values()} == {GPU}
        assert {tensor.dtype for tensor in engine.state().tensors.values()} == {torch.float32}


def test_shards_that_are_offloaded_keep_their_count_of_updates_on_the_cpu() -> None:
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))], fused=True)
    with FakeTensorMode():
        on_gpu = zero_moments(torch.empty(3, device=GPU), optimizer)
        offloaded = zero_moments(torch.empty(3), optimizer)
    assert {t.device for t in on_gpu.values()} == {GPU}
    assert {t.device.type for t in offloaded.values()} == {"cpu"}


def loss(model: nn.Module, batch: Batch) -> LossSum:
    return LossSum(model(batch.inputs["x"]).square().sum(), torch.tensor(1.0))


def batch_of(seed: int) -> Batch:
    x = torch.randn(3, 4, generator=torch.Generator().manual_seed(seed))
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch({"x": x}, empty, empty, empty, 3)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_engine_goes_on_from_the_state_of_another(dtype: torch.dtype) -> None:
    def train(engine: Ddp, steps: range) -> list[float]:
        found = []
        for step in steps:
            batch = batch_of(step)
            batch = (
                batch if dtype == torch.float32 else Batch({"x": batch.inputs["x"].to(dtype)}, *[batch.targets] * 3, 3)
            )
            found.append(float(engine.forward_backward(batch, loss, torch.tensor(3.0), last=True).loss))
            engine.step(1e-2)
        return found

    torch.manual_seed(0)
    whole = make_engine(torch.device("cpu"), dtype, fused=True)
    torch.manual_seed(0)
    first = make_engine(torch.device("cpu"), dtype, fused=True)
    expected = train(whole, range(6))
    train(first, range(3))
    torch.manual_seed(9)
    second = make_engine(torch.device("cpu"), dtype, fused=True)
    held = second.state()
    kept: dict[str, Tensor] = {name: tensor.clone() for name, tensor in first.state().tensors.items()}
    for name, tensor in held.tensors.items():
        tensor.copy_(kept[name])  # as a checkpoint is loaded
    held.updates = 3
    second.load(held)
    assert train(second, range(3, 6)) == expected[3:]
    for (name, got), (_, want) in zip(second.weights(trainable=True), whole.weights(trainable=True), strict=True):
        assert torch.equal(got, want) and got.dtype == torch.float32, name
