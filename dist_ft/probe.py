"""The trained model's logits on a few tokens, to hold an exported model against."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .state import Batch, Engine, LossSum, Task

PROBE_TOKENS = 64
# Relative deviation that rounding explains, by the precision of the forward. Training computes in bfloat16 from float32
# weights and a loaded model from bfloat16 ones, which measures up to 3e-2 on small models. Tensors are compared bit by
# bit besides (export.py); this finds what no tensor shows, such as a scale or a tie that was lost.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}


@dataclass(frozen=True)
class Probe:
    """One document: `input_ids` [n] int64 and the model's `logits` [n, vocabulary] float32, both on the CPU."""

    input_ids: Tensor
    logits: Tensor


@dataclass(frozen=True)
class Deviation:
    """Between two models' logits: the largest difference, and the L2 norm of the difference over that of the logits."""

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"largest {self.largest:.2e}, relative {self.relative:.2e}"


def take_probe(engine: Engine, task: Task, token_ids: Sequence[int] | np.ndarray) -> Probe:
    """Run the first tokens of `token_ids` through the engine's model; every rank takes part and gives the same ones."""
    ids = np.array([int(token) for token in token_ids[:PROBE_TOKENS]], dtype=np.int64)
    seen: list[Tensor] = []

    def capture(model: nn.Module, batch: Batch) -> LossSum:
        logits = model(**batch.inputs, use_cache=False).logits
        seen.append(logits[0].detach().float().cpu())
        return LossSum(logits.new_zeros(()), logits.new_ones(()))

    engine.evaluate(task.collate([[{"input_ids": ids, "labels": ids}]]), capture)
    return Probe(torch.from_numpy(ids), seen[0])


@torch.no_grad()
def probe_model(model: nn.Module, token_ids: Sequence[int] | np.ndarray | Tensor) -> Probe:
    """The same of a model in this process."""
    ids = torch.tensor([int(token) for token in token_ids[:PROBE_TOKENS]])
    device = next(model.parameters()).device
    was_training = model.training
    logits = model.eval()(input_ids=ids[None].to(device), use_cache=False).logits[0].float().cpu()
    model.train(was_training)
    return Probe(ids, logits)


def compare(one: Probe, other: Probe) -> Deviation:
    """How far apart two models are on the same tokens; where one has nan, infinitely."""
    assert torch.equal(one.input_ids, other.input_ids)
    difference = one.logits.double() - other.logits.double()
    relative = float(difference.norm() / one.logits.double().norm())
    if not np.isfinite(relative):
        return Deviation(float("inf"), float("inf"))
    return Deviation(float(difference.abs().max()), relative)
