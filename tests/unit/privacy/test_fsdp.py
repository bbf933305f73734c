"""Private training under FSDP2 against plain loops over single rows; tests/dist has several ranks."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from opacus.grad_sample import GradSampleHooks
from torch import nn

from dist_ft.config.engine import DdpConfig, FsdpConfig
from dist_ft.errors import TrainingError
from dist_ft.inspect.memory import estimate_rows
from dist_ft.model.anatomy import find_anatomy
from dist_ft.privacy.ddp import Private
from dist_ft.privacy.fsdp import PrivateFsdp
from dist_ft.privacy.mechanism import Privacy
from dist_ft.privacy.norms import RowNorms
from dist_ft.process.place import Place
from dist_ft.state import BuiltModel
from tests.private import (
    CPU,
    HOOKED,
    MODELS,
    TASK_OF,
    added_norms,
    batches,
    clipped_sum,
    feed,
    make_ddp,
    make_model,
    make_privacy,
    make_task,
    turn_rows,
)


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def make_engine(model: nn.Module, privacy: Privacy, dtype: torch.dtype = torch.float32, **changes: Any) -> PrivateFsdp:
    config = FsdpConfig(name="fsdp", **changes)
    engine = PrivateFsdp(privacy, config, device=CPU, place=Place(), dtype=dtype, max_grad_norm=1.0)
    engine.setup(
        BuiltModel(model, find_anatomy(model)), lambda named: torch.optim.AdamW([p for _, p in named], lr=1e-2)
    )
    return engine


def sums_of(engine: Any) -> list[torch.Tensor]:
    if not isinstance(engine, PrivateFsdp):
        return list(engine.sums)
    return [torch.zeros(p.shape) if p.grad is None else p.grad.full_tensor() for _, p in engine.trained]  # type: ignore[attr-defined]


@pytest.mark.parametrize("mode", ["hooks", "loop"])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in MODELS), ("llama-tied", "lora"), ("bert", "lora")]
)
def test_clipped_sums_are_those_of_a_plain_loop_over_single_rows(name: str, method: str, mode: str) -> None:
    model, task = make_model(name, method), TASK_OF[name]
    clip = float(np.median(clipped_sum(model, task)[1]))
    expected, norms = clipped_sum(model, task, clip)
    assert min(norms) < clip < max(norms)
    engine = make_engine(model, make_privacy(hooks=mode == "hooks", max_grad_norm=clip))
    for per_device in (3, 7, 1):
        feed(engine, task, per_device)
        for (parameter, _), got, want in zip(engine.trained, sums_of(engine), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6), (parameter, per_device)
        assert {parameter.grad for parameter in engine.norms.names} == {None}, "no whole gradient is kept"
        assert set(engine.norms.names.values()) == {name for name, _ in engine.trained}
        engine.optimizer.zero_grad(set_to_none=True)
    assert engine.proven == (mode == "hooks" and (method == "lora" or name in HOOKED))


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-tied"])
def test_no_row_adds_more_than_the_clip_in_bfloat16(name: str, hooks: bool) -> None:
    for clip in (1e-3, 1.3e-3, 1.7e-3, 0.011, 0.05):  # the bits of their factors differ
        norms = added_norms(make_engine, sums_of, name, clip, hooks=hooks)
        assert max(norms) <= clip and min(norms) > 0.95 * clip, (clip, norms)


def test_rows_see_the_same_dropout_in_both_backwards() -> None:
    made = make_model("bert")
    for module in made.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.3
    plain = copy.deepcopy(made).train()
    _, loss = make_task("classes")
    micro = next(batches("classes", 7))
    torch.manual_seed(11)
    losses = loss(plain, micro).losses
    assert losses is not None
    rows = [torch.autograd.grad(one, list(plain.parameters()), retain_graph=True) for one in losses]
    norms = [math.sqrt(sum(float(g.square().sum()) for g in row)) for row in rows]
    clip = float(np.median(norms))
    engine = make_engine(made, make_privacy(max_grad_norm=clip))
    torch.manual_seed(11)
    engine.forward_backward(micro, loss, torch.tensor(1.0), last=True)
    for i, got in enumerate(sums_of(engine)):
        want = torch.stack([row[i] / max(1.0, norm / clip) for row, norm in zip(rows, norms, strict=True)]).sum(dim=0)
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert engine.proven


def test_recomputed_blocks_and_weights_kept_between_forward_and_backward() -> None:
    for reshards in (True, False):
        model = make_model("llama")
        expected, _ = clipped_sum(model, "causal")
        model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
        engine = make_engine(model, make_privacy(), reshard_after_forward=reshards)
        feed(engine, "causal", 4)
        for got, want in zip(sums_of(engine), expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
        assert engine.hooks is None


def test_a_step_is_that_of_the_noisy_mean_over_the_expected_rows() -> None:
    privacy = make_privacy(noise_multiplier=1.3)
    engine, plain = make_engine(make_model("bert"), privacy), make_model("bert")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3)
    for step in (1, 2, 3):
        expected, _ = clipped_sum(plain, "classes")
        if step < 3:
            feed(engine, "classes", 3)
        else:  # chance took no row
            empty = next(batches("classes", 3)).without_targets()
            assert (
                float(engine.forward_backward(empty, make_task("classes")[1], torch.tensor(0.0), last=True).loss) == 0
            )
            expected = [torch.zeros_like(total) for total in expected]
        stats = engine.step(5e-3)
        for parameter, total, drawn in zip(
            plain.parameters(), expected, privacy.draw_noise(step, expected), strict=True
        ):
            parameter.grad = (total + drawn) / 7
        norm = math.sqrt(sum(float(p.grad.square().sum()) for p in plain.parameters() if p.grad is not None))
        optimizer.step()
        assert stats.grad_norm == pytest.approx(norm, rel=1e-5)
        assert stats.metrics == {"train/epsilon": privacy.epsilon(step)}
    for (_, got), want in zip(engine.weights(trainable=True), plain.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=2e-6)


def raise_always(layer: nn.Module, activations: list[torch.Tensor], backprops: torch.Tensor) -> dict[Any, torch.Tensor]:
    raise ValueError("no such layer")


@pytest.mark.parametrize("sampler", [turn_rows, raise_always])
@pytest.mark.parametrize("make", [make_engine, make_ddp], ids=["fsdp", "ddp"])
def test_hooks_that_are_wrong_are_found_and_given_up(make: Any, sampler: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = make_model("llama")
    expected, _ = clipped_sum(model, "causal")
    monkeypatch.setitem(GradSampleHooks.GRAD_SAMPLERS, nn.Linear, sampler)
    engine = make(model, make_privacy())
    loss = make_task("causal")[1]
    with pytest.warns(UserWarning, match="one by one"):
        for micro in batches("causal", 4):
            engine.forward_backward(micro, loss, torch.tensor(1.0), last=False)
    for got, want in zip(sums_of(engine), expected, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-6)
    assert engine.hooks is None


def test_a_model_that_cannot_run_under_hooks_says_what_to_set() -> None:
    model: Any = make_model("llama")
    model.model.layers[1].mlp.register_forward_hook(lambda module, inputs, output: output.mul_(1.0))
    with pytest.raises(TrainingError, match="grad_sample_mode"):
        feed(make_engine(model, make_privacy()), "causal", 4)


@pytest.mark.parametrize("rows", [0, 4])
def test_memory_for_gradients_of_rows_is_what_is_held(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of those that hooks leave, and DDP's sums; what is held for a moment only to be added up is not counted."""
    held, take, add = [0], RowNorms.take_samples, Private._add_clipped

    def take_samples(norms: RowNorms, parameter: Any) -> None:
        held.append(parameter.grad_sample.nbytes)
        take(norms, parameter)

    def add_clipped(engine: Private, weights: torch.Tensor) -> None:
        held.append(sum(parameter.grad_sample.nbytes for _, parameter in engine.trained))  # type: ignore[attr-defined]
        add(engine, weights)

    monkeypatch.setattr(RowNorms, "take_samples", take_samples)
    monkeypatch.setattr(Private, "_add_clipped", add_clipped)
    for make, config in ((make_engine, FsdpConfig(name="fsdp")), (make_ddp, DdpConfig(name="ddp"))):
        del held[1:]
        engine: Any = make(make_model("llama"), make_privacy(hooks=rows > 0))
        engine.forward_backward(next(batches("causal", 4)), make_task("causal")[1], torch.tensor(1.0), last=True)
        learn = [parameter.numel() for _, parameter in engine.trained]
        sums = sum(total.nbytes for total in getattr(engine, "sums", []))
        assert estimate_rows(config, rows, sum(learn), max(learn)).device == max(held) + sums
