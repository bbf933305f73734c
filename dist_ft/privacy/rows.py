"""Common parts of the private engines: rows of a micro-batch, clip factors, and handling of Opacus's hooks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RequestError
from ..state import Batch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # relative, of the hooks' gradients against autograd's
# Relative amount by which rounding may increase the norm of a clipped gradient: the backward of the scaled loss under
# FSDP2 rounds differently from the backward in which the norm was measured. Measured: at most 2e-7 in float32; in
# bfloat16, 0.006 in models of 2 blocks and 0.008 in one of 24.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
PADDED = ("input_ids", "attention_mask", "token_type_ids")  # [rows, T], padded on the right


def row_weights(micro: Batch) -> Tensor:
    """Return the divisor of each row's summed loss that gives its mean, `[rows]`: its number of targets, at least 1."""
    rows = len(micro.samples)
    if micro.weight is not None:  # the task gives all rows the same weight
        return torch.full((rows,), micro.weight / rows, device=micro.targets.device)
    return torch.bincount(micro.documents, minlength=rows).clamp(min=1).float()


def clip_factors(norms: Tensor, weights: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """Return the factor for the gradient of each row's summed loss, `[rows]` float32.

    Args:
        norms: Norms of these gradients, `[rows]` float64.
        weights: Result of `row_weights`, `[rows]`.
        limit: Maximum norm that a row may contribute to the sum, including rounding.
        dtype: Dtype in which gradients are computed.
    """
    means, bound = norms / weights, limit / (1 + ROUNDING[dtype])
    return (torch.where(means <= bound, 1.0, bound / means) / weights).float()


def split_rows(micro: Batch) -> Iterator[Batch]:
    """Yield each row of a padded micro-batch as a separate micro-batch without padding."""
    inputs = micro.inputs
    outputs: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"])
    width = 1 if torch.equal(micro.positions, micro.documents) else outputs.shape[1]  # outputs per row
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for i, (sample, length) in enumerate(zip(micro.samples, lengths, strict=False)):
        own = micro.documents == i
        yield replace(
            micro,
            inputs={
                name: value[i : i + 1, :length] if name in PADDED else value[i : i + 1]
                for name, value in inputs.items()
            },
            targets=micro.targets[own],
            positions=micro.positions[own] - i * width,
            documents=torch.zeros_like(micro.documents[own]),
            tokens=int(length),
            samples=(sample,),
            weight=None if micro.weight is None else micro.weight / len(micro.samples),
        )


def refuse_batch_norm(model: nn.Module) -> None:
    """Check that the model has no batch norm, which makes the output of a row depend on other rows.

    Raises:
        RequestError: The model has batch norm.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            rule = f"{name} normalises by the whole batch, so that rows have no separate gradients"
            raise RequestError.of("privacy", rule, "use a model without batch norm")


def repeat_shared_positions(model: nn.Module, rows: Callable[[], int]) -> None:
    """Repeat embedding lookups that all rows share (such as positions) for each row; the values are unchanged.

    Opacus's hooks need one lookup per row.

    Args:
        model: The model whose embeddings get the hook.
        rows: Returns the number of rows of the current micro-batch under hooks; 0 or 1 changes nothing.
    """

    def repeat(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
        ids = inputs[0] if inputs else None
        if not (isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == 1 and rows() > 1):
            return None
        return (ids.expand(rows(), -1), *inputs[1:])

    for module in model.modules():
        if isinstance(module, nn.Embedding):
            module.register_forward_pre_hook(repeat)


def remove_hooks(model: nn.Module, hooks: Any) -> None:
    """Remove Opacus's hooks and the attributes that a failed backward has left."""
    hooks.remove_hooks()
    for module in model.modules():
        module.__dict__.pop("activations", None)
        module.__dict__.pop("max_batch_len", None)
        for parameter in module.parameters(recurse=False):
            parameter.__dict__.pop("_current_grad_sample", None)


def is_proven_again(step: int) -> bool:
    """Return whether hooks are verified in this step: 1, 2, 4, 8, ..., since zero gradients (LoRA) prove nothing."""
    return step & (step - 1) == 0


def get_chance(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Return the state of the random generators that dropout uses, to restore it after a failed attempt."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_chance(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Restore the state of the random generators that dropout uses."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
