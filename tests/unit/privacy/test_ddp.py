"""Private training under DDP against plain loops over single rows."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import nn

from dist_ft.errors import RequestError
from tests.private import (
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
)


@pytest.mark.parametrize("mode", ["hooks", "loop"])
@pytest.mark.parametrize(
    ("name", "method"), [*((name, "full") for name in MODELS), ("llama-tied", "lora"), ("bert", "lora")]
)
def test_clipped_sums_are_those_of_a_plain_loop_over_single_rows(name: str, method: str, mode: str) -> None:
    model, task = make_model(name, method), TASK_OF[name]
    clip = float(np.median(clipped_sum(model, task)[1]))  # some rows are above it and some below
    expected, norms = clipped_sum(model, task, clip)
    assert min(norms) < clip < max(norms)
    engine = make_ddp(model, make_privacy(hooks=mode == "hooks", max_grad_norm=clip))
    for per_device in (3, 7, 1):
        for total in engine.sums:
            total.zero_()
        feed(engine, task, per_device)
        for (parameter, _), got, want in zip(engine.trained, engine.sums, expected, strict=True):
            assert torch.allclose(got, want, rtol=1e-4, atol=1e-6), (parameter, per_device)
    assert engine.proven == (mode == "hooks" and (method == "lora" or name in HOOKED))


def test_a_step_is_that_of_the_noisy_mean_over_the_expected_rows() -> None:
    privacy = make_privacy(noise_multiplier=1.3)
    engine, plain = make_ddp(make_model("bert"), privacy), make_model("bert")
    expected, _ = clipped_sum(plain, "classes")
    optimizer = torch.optim.AdamW(plain.parameters(), lr=5e-3)
    for step in (1, 2):
        expected, _ = clipped_sum(plain, "classes")
        feed(engine, "classes", 3)
        stats = engine.step(5e-3)
        noise = privacy.draw_noise(step, expected)
        for parameter, total, drawn in zip(plain.parameters(), expected, noise, strict=True):
            parameter.grad = (total + drawn) / 7
        optimizer.step()
        assert stats.metrics == {"train/epsilon": privacy.epsilon(step)}
    for got, want in zip(engine.model.parameters(), plain.parameters(), strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=2e-6)


@pytest.mark.parametrize("hooks", [True, False])
@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2-tied"])
def test_no_row_adds_more_than_the_clip_in_bfloat16(name: str, hooks: bool) -> None:
    for clip in (1e-3, 1.3e-3, 1.7e-3, 0.011, 0.05):  # the bits of their factors differ
        norms = added_norms(make_ddp, lambda engine: engine.sums, name, clip, hooks=hooks)
        assert max(norms) <= clip and min(norms) > 0.95 * clip, (clip, norms)


def test_a_step_without_rows_is_noise_alone() -> None:
    engine = make_ddp(make_model("bert"), make_privacy(noise_multiplier=1.0))
    empty = next(batches("classes", 3)).without_targets()
    assert float(engine.forward_backward(empty, make_task("classes")[1], torch.tensor(0.0), last=True).loss) == 0
    noise = engine.privacy.draw_noise(1, engine.sums)
    norm = math.sqrt(sum(float(drawn.square().sum()) for drawn in noise)) / 7
    assert engine.step(1e-3).grad_norm == pytest.approx(norm, rel=1e-5)


def test_recomputed_blocks_and_batch_norm() -> None:
    model = make_model("llama")
    expected, _ = clipped_sum(model, "causal")
    model.gradient_checkpointing_enable({"use_reentrant": False})  # type: ignore[operator]
    engine = make_ddp(model, make_privacy())
    feed(engine, "causal", 4)
    assert all(torch.allclose(got, want, rtol=1e-4, atol=1e-6) for got, want in zip(engine.sums, expected, strict=True))
    with pytest.raises(RequestError, match="normalises by the whole batch"):
        make_ddp(nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), make_privacy())
