"""The parts of a model, found once from its modules and never from a list of model names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..process import comm
from ..state import Anatomy, Mixture
from .quantization.packed import shapes_of
from .reach import find_idle, lies_in
from .router_form import find_form


def find_anatomy(model: nn.Module, *, task_head: Iterable[str] = (), new_token_ids: Iterable[int] = ()) -> Anatomy:
    """Find the parts of a loaded model before a method is applied to it.

    Raises:
        RequestError: A router does not return the logits by which it chooses experts.
    """
    idle = find_idle(model)
    blocks = [name for name in _find_blocks(model) if not lies_in(name, idle)]
    mixtures = [mixture for mixture in _find_mixtures(model, blocks) if not lies_in(mixture.experts, idle)]
    names = {id(module): name for name, module in model.named_modules()}
    reached = [(name, module) for name, module in model.named_modules() if not lies_in(name, idle)]
    inside = {id(module) for block in blocks for module in model.get_submodule(block).modules()}
    routers = {mixture.router for mixture in mixtures}
    embeddings, head = _embeddings_of(model)
    return Anatomy(
        model=model,
        blocks=tuple(blocks),
        linears=tuple(
            name
            for name, module in reached
            if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and name not in routers
        ),
        norms=tuple(name for name, module in reached if _is_norm(module)),
        mixtures=tuple(mixtures),
        embeddings=None if embeddings is None else names[id(embeddings)],
        head=None if head is None else names[id(head)],
        tied=embeddings is not None and head is not None and head.weight is embeddings.weight,
        persistent_buffers=tuple(find_buffers(model)),
        task_head=tuple(task_head),
        new_token_ids=tuple(new_token_ids),
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


def _find_mixtures(model: nn.Module, blocks: list[str]) -> list[Mixture]:
    """Return the mixtures of experts in order; empty for a dense model."""
    found = []
    layers = {id(module): i for i, name in enumerate(blocks) for module in model.get_submodule(name).modules()}
    for name, module in model.named_modules():
        if id(module) not in layers:
            continue
        prefix = f"{name}." if name else ""
        for experts_name, experts in module.named_children():
            shape = _experts_shape(experts)
            if shape is None:
                continue
            siblings = ((other, child) for other, child in module.named_children() if child is not experts)
            routers = [(other, child) for other, child in siblings if _routes(child, *shape)]
            if len(routers) == 1:
                (router_name, router), count = routers[0], shape[0]
                form = find_form(router, prefix + router_name, getattr(model, "config", None))
                fused = not isinstance(experts, nn.ModuleList)
                parts = (prefix + router_name, prefix + experts_name)
                found.append(Mixture(name, layers[id(module)], *parts, count, fused, form))
    return found


def _experts_shape(module: nn.Module) -> tuple[int, set[int]] | None:
    """Return the number of experts in `module` and the sizes of their matrices; None if it has no experts."""
    if isinstance(module, nn.ModuleList):
        shapes = [shapes_of(expert) for expert in module]
        alike = len(shapes) > 1 and bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)
        return (len(shapes), {size for shape in shapes[0] for size in shape}) if alike else None
    if isinstance(module, _ConvNd):  # its weight has three dimensions too
        return None
    fused = [shape for shape in shapes_of(module, recurse=False) if len(shape) == 3]
    counts = {shape[0] for shape in fused}
    if len(counts) != 1 or counts == {1}:
        return None
    return counts.pop(), {size for shape in fused for size in shape[1:]}


def _routes(module: nn.Module, num_experts: int, sizes: set[int]) -> bool:
    """Return whether `module` is a router of experts of these sizes: its weight is `[experts, hidden]`."""
    weight = getattr(module, "weight", None)
    if not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        return False
    return weight.shape[0] == num_experts and weight.shape[1] in sizes


def _is_norm(module: nn.Module) -> bool:
    return "Norm" in type(module).__name__ and getattr(getattr(module, "weight", None), "ndim", 0) == 1
