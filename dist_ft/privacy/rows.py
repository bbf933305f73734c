"""What private engines share: the rows of a micro-batch, and what their gradients are multiplied with."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import RequestError
from ..state import Batch

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of what hooks find against autograd's own gradients
# By how much rounding may lengthen a row's clipped gradient: the backward of a scaled loss, which FSDP2 sums, rounds
# otherwise than the one in which the norm was measured. Measured are at most 2e-7 in float32; in bfloat16 0.006 in
# models of 2 blocks, and 0.008 in one of 24.
ROUNDING = {torch.float32: 1e-6, torch.bfloat16: 2e-2}
PADDED = ("input_ids", "attention_mask", "token_type_ids")  # [rows, T], padded behind


def row_weights(micro: Batch) -> Tensor:
    """[rows] by what each row's summed loss is divided to give its mean: its targets, at least one."""
    rows = len(micro.samples)
    if micro.weight is not None:  # of tasks whose rows all weigh the same
        return torch.full((rows,), micro.weight / rows, device=micro.targets.device)
    return torch.bincount(micro.documents, minlength=rows).clamp(min=1).float()


def clip_factors(norms: Tensor, weights: Tensor, limit: float, dtype: torch.dtype) -> Tensor:
    """[rows] float32: what the gradient of each row's summed loss is multiplied with.

    Args:
        norms: [rows] float64, of these gradients.
        weights: [rows], see `row_weights`.
        limit: greatest norm that a row may add to the sum, after rounding.
        dtype: in which gradients are computed.
    """
    means, bound = norms / weights, limit / (1 + ROUNDING[dtype])
    return (torch.where(means <= bound, 1.0, bound / means) / weights).float()


def split_rows(micro: Batch) -> Iterator[Batch]:
    """The rows of a padded micro-batch, each a micro-batch without padding of its own."""
    inputs = micro.inputs
    outputs: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"])
    width = 1 if torch.equal(micro.positions, micro.documents) else outputs.shape[1]  # one output a row, or a token
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
    """Rows must not see each other.

    Raises:
        RequestError: the model has batch norm.
    """
    for name, module in model.named_modules():
        if isinstance(module, _BatchNorm):
            rule = f"{name} normalises by the whole batch, so that no row has a gradient of its own"
            raise RequestError.of("privacy", rule, "take a model without batch norm")


def repeat_shared_positions(model: nn.Module, rows: Callable[[], int]) -> None:
    """Embeddings that are looked up once for all rows (positions) are looked up for each: values are the same.

    Args:
        model: whose embeddings.
        rows: how many the model sees now under hooks; 0 or 1 leaves all as it is.
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
    """Take Opacus's hooks off, and what a failed attempt has left."""
    hooks.remove_hooks()
    for module in model.modules():
        module.__dict__.pop("activations", None)
        module.__dict__.pop("max_batch_len", None)
        for parameter in module.parameters(recurse=False):
            parameter.__dict__.pop("_current_grad_sample", None)


def is_proven_again(step: int) -> bool:
    """Whether a step (1, 2, 4, 8 …) proves hooks anew: gradients that were zero, as LoRA's once are, prove nothing."""
    return step & (step - 1) == 0


def get_chance(device: torch.device) -> tuple[Tensor, Tensor | None]:
    """Where dropout's generators stand; a failed attempt must not move them."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_chance(state: tuple[Tensor, Tensor | None], device: torch.device) -> None:
    """Let dropout's generators stand where they stood."""
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)
