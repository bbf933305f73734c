"""Probe: the logits of the trained model on a few tokens, against which an exported model is compared."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..protocols import Engine, Task
from ..state import Batch, Beat, LossSum, Sample, unwatched

PROBE_TOKENS = 64
# Largest relative deviation that rounding explains, by dtype of the forward. Training computes in bfloat16 from float32
# weights, a loaded model from bfloat16 weights: the measured deviation is up to 3e-2 on small models. Tensors are also
# compared bit by bit (account.py); the logits reveal errors outside the tensors, such as a lost scaling or weight tie.
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-1, "float16": 2e-2}


@dataclass(frozen=True)
class Probe:
    """Model inputs of one sample and the resulting `logits`, `[n, …]` float32, both on the CPU."""

    inputs: Mapping[str, Tensor]
    logits: Tensor


@dataclass(frozen=True)
class Deviation:
    """Deviation between the logits of two models."""

    largest: float  # absolute difference
    relative: float  # L2 norm of the difference over that of the first model's logits

    def __str__(self) -> str:
        return f"largest {self.largest:.2e}, relative {self.relative:.2e}"


def take_probe(engine: Engine, task: Task, sample: Sample) -> Probe:
    """Run the first tokens of `sample` through the engine's model; collective, with the same result on every rank."""
    batch = task.collate([shorten(sample, task)])
    seen: list[Tensor] = []

    def capture(model: nn.Module, batch: Batch) -> LossSum:
        logits = logits_of(model(**batch.inputs))
        seen.append(logits.detach().float().cpu())
        return LossSum(logits.new_zeros(()), logits.new_ones(()))

    engine.evaluate(batch, capture)
    return Probe(plain_inputs(batch), seen[0])


@torch.no_grad()
def probe_model(model: nn.Module, inputs: Mapping[str, Tensor], tick: Beat = unwatched) -> Probe:
    """Run `inputs` through a model in this process; each module that it calls ticks."""
    device = next(model.parameters()).device
    was_training = model.training
    hooks = [module.register_forward_pre_hook(lambda *_: tick("probing the model")) for module in model.modules()]
    try:
        logits = logits_of(model.eval()(**{name: tensor.to(device) for name, tensor in inputs.items()}))
    finally:
        for hook in hooks:
            hook.remove()
    model.train(was_training)
    return Probe(inputs, logits.float().cpu())


def shorten(sample: Sample, task: Task) -> Sample:
    """Return the first tokens of the sample's first document, or of its source and target."""
    segments = sample.segments[: 1 if task.layout.apart else task.layout.sequences]
    return replace(sample, segments=[{k: values[:PROBE_TOKENS] for k, values in part.items()} for part in segments])


def plain_inputs(batch: Batch) -> dict[str, Tensor]:
    """Return the tensors among the batch's inputs, which every model of the architecture accepts."""
    return {name: value for name, value in batch.inputs.items() if isinstance(value, Tensor)}


def logits_of(output: Any) -> Tensor:
    """Return the logits of the first row, `[n, …]`; start and end logits are stacked for question answering."""
    if "logits" in output:
        logits: Tensor = output.logits
        return logits[0]
    return torch.stack([output.start_logits[0], output.end_logits[0]], dim=-1)


def compare(one: Probe, other: Probe) -> Deviation:
    """Compute the deviation of two models' logits on the same tokens; it is infinite if there are NaNs."""
    assert all(torch.equal(tensor, other.inputs[name]) for name, tensor in one.inputs.items())
    difference = one.logits.double() - other.logits.double()
    relative = float(difference.norm() / one.logits.double().norm())
    if not np.isfinite(relative):
        return Deviation(float("inf"), float("inf"))
    return Deviation(float(difference.abs().max()), relative)
