"""Private training under FSDP2 against plain loops over single rows; tests/dist has several ranks."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from dist_ft.comm import Place
from dist_ft.engine.private_fsdp import PrivateFsdp
from dist_ft.privacy import Privacy
from dist_ft.schema import FsdpConfig
from tests.unit.test_privacy import CPU, MODELS, batches, clipped_sum, make_model, make_privacy, make_task


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_engine(model: nn.Module, privacy: Privacy, **changes: Any) -> PrivateFsdp:
    config = FsdpConfig(name="fsdp", **changes)
    engine = PrivateFsdp(privacy, config, device=CPU, place=Place(), dtype=torch.float32, max_grad_norm=1.0)
    engine.setup(lambda weights: model, lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2))
    return engine


def feed(engine: PrivateFsdp, task: str, per_device: int) -> float:
    loss = make_task(task)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # that rows go one by one
        sums = [engine.forward_backward(b, loss, torch.tensor(1.0), last=False).loss for b in batches(task, per_device)]
    return float(sum(sums))


def sums_of(engine: PrivateFsdp) -> list[torch.Tensor]:
    return [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for _, p in engine.trained]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["hooks", "loop"])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in MODELS), ("llama-tied", "lora"), ("bert", "lora")]
)
def test_clipped_sums_are_those_of_a_plain_loop_over_single_rows(name: str, method: str, mode: str) -> None:
    model, task = make_model(name, method), MODELS[name][2]
    clip = float(np.median(clipped_sum(model, task)[1]))
    expected, norms = clipped_sum(model, task, clip)
    assert min(norms) < clip < max(norms)
    engine = make_engine(model, make_privacy(hooks=mode == "hooks", max_grad_norm=clip))
    for per_device in (3, 7, 1):
        feed(engine, task, per_device)
        for (parameter, _), got, want in zip(engine.trained, sums_of(engine), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6), (parameter, per_device)
        engine.optimizer.zero_grad(set_to_none=True)
    assert engine.proven == (mode == "hooks" and (method == "lora" or MODELS[name][3]))
