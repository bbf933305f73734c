"""The parts of a model, found once from its modules and never from a list of model names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from ..process import comm
from ..state import Anatomy
from .direct import is_used_directly
from .moe.find import find_mixtures
from .reach import find_idle, lies_in


def find_anatomy(model: nn.Module, *, task_head: Iterable[str] = (), new_token_ids: Iterable[int] = ()) -> Anatomy:
    """Find the parts of a loaded model before a method is applied to it."""
    idle = find_idle(model)
    blocks = [name for name in _find_blocks(model) if not lies_in(name, idle)]
    mixtures, lost_experts = find_mixtures(model, blocks)
    names = {id(module): name for name, module in model.named_modules()}
    reached = [(name, module) for name, module in model.named_modules() if not lies_in(name, idle)]
    inside = {id(module) for block in blocks for module in model.get_submodule(block).modules()}
    routers = [mixture.router for mixture in mixtures]
    embeddings, head = _embeddings_of(model)
    return Anatomy(
        model=model,
        blocks=tuple(blocks),
        linears=tuple(
            name
            for name, module in reached
            if isinstance(module, nn.Linear | Conv1D)
            and id(module) in inside
            and not lies_in(name, routers)
            and not is_used_directly(model, name)
        ),
        norms=tuple(name for name, module in reached if _is_norm(module) and not lies_in(name, routers)),
        mixtures=tuple(mixtures),
        embeddings=None if embeddings is None else names[id(embeddings)],
        head=None if head is None else names[id(head)],
        tied=embeddings is not None and head is not None and head.weight is embeddings.weight,
        persistent_buffers=tuple(find_buffers(model)),
        task_head=tuple(task_head),
        new_token_ids=tuple(new_token_ids),
        lost_experts=lost_experts,
        idle=tuple(idle),
    )


def find_buffers(model: nn.Module) -> dict[str, Tensor]:
    """Return the buffers of a model's state dict by name."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def share_buffers(model: nn.Module) -> None:
    """Broadcast the persistent buffers of rank 0, because some engines distribute only parameters.

    Otherwise, only rank 0 would have the correction bias of DeepSeek-V3's routers.
    """
    buffers = find_buffers(model)
    if comm.from_main(bool(buffers)):
        for name, tensor in comm.from_main({name: buffer.cpu() for name, buffer in buffers.items()}).items():
            buffers[name].copy_(tensor)


def unwrap(module: nn.Module) -> nn.Module:
    """Return the original module inside peft's wrapper for an adapter or a trainable copy."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _embeddings_of(model: Any) -> tuple[Any, Any]:
    """Return the input and output embeddings of a transformers model; None if it has none."""
    if not hasattr(model, "get_input_embeddings"):
        return None, None
    return model.get_input_embeddings(), model.get_output_embeddings()


def _find_blocks(model: nn.Module, prefix: str = "") -> list[str]:
    """Return the names of the children with parameters of every outermost ModuleList.

    Lists inside a block, such as separate experts, belong to the block.
    """
    blocks: list[str] = []
    for name, child in model.named_children():
        if isinstance(child, nn.ModuleList):
            inner = ((f"{prefix}{name}.{i}", block) for i, block in child.named_children())
            blocks.extend(path for path, block in inner if any(True for _ in block.parameters()))
        else:
            blocks.extend(_find_blocks(child, f"{prefix}{name}."))
    return blocks


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 1
