"""The trained model's logits on a few tokens, to hold an exported model against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..state import Batch, Engine, LossSum, Sample, Task

PROBE_TOKENS = 64
# Relative deviation that rounding explains, by the precision of the forward. Training computes in bfloat16 from float32
# weights and a loaded model from bfloat16 ones, which measures up to 3e-2 on small models. Tensors are compared bit by
# bit besides (export.py); this finds what no tensor shows, such as a scale or a tie that was lost.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}


@dataclass(frozen=True)
class Probe:
    """One sample: what the model is given, and its `logits` [n, …] float32, both on the CPU."""

    inputs: Mapping[str, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Deviation:
    """Between two models' logits: the largest difference, and the L2 norm of the difference over that of the logits."""

    largest: float
    relative: float

    def __str__(self) -> str:
        return f"largest {self.largest:.2e}, relative {self.relative:.2e}"


def take_probe(engine: Engine, task: Task, sample: Sample) -> Probe:
    """Run the first tokens of `sample` through the engine's model; every rank takes part and gives the same one."""
    batch = task.collate([shorten(sample, task)])
    seen: list[Tensor] = []

    def capture(model: nn.Module, batch: Batch) -> LossSum:
        logits = logits_of(model(**batch.inputs))
        seen.append(logits.detach().float().cpu())
        return LossSum(logits.new_zeros(()), logits.new_ones(()))

    engine.evaluate(batch, capture)
    return Probe(plain_inputs(batch), seen[0])


@torch.no_grad()
def probe_model(model: nn.Module, inputs: Mapping[str, Tensor]) -> Probe:
    """The same of a model in this process."""
    device = next(model.parameters()).device
    was_training = model.training
    logits = logits_of(model.eval()(**{name: tensor.to(device) for name, tensor in inputs.items()}))
    model.train(was_training)
    return Probe(inputs, logits.float().cpu())


def shorten(sample: Sample, task: Task) -> Sample:
    """Of a sample's first document (or source and target) the first tokens."""
    segments = sample.segments[: 1 if task.layout.apart else task.layout.sequences]
    return replace(sample, segments=[{k: values[:PROBE_TOKENS] for k, values in part.items()} for part in segments])


def plain_inputs(batch: Batch) -> dict[str, Tensor]:
    """The tensors of a batch's inputs, which any model of the kind takes: without what tells documents apart."""
    return {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}


def logits_of(output: Any) -> Tensor:
    """[n, …]: what the model gives for its one row; of a question's answer the starts' and ends' scores."""
    if "logits" in output:
        logits: Tensor = output.logits
        return logits[0]
    return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)


def compare(one: Probe, other: Probe) -> Deviation:
    """How far apart two models are on the same tokens; where one has nan, infinitely."""
    assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())
    difference = one.logits.double() - other.logits.double()
    relative = float(difference.norm() / one.logits.double().norm())
    if not np.isfinite(relative):
        return Deviation(float("inf"), float("inf"))
    return Deviation(float(difference.abs().max()), relative)
