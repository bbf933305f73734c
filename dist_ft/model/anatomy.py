"""What a model is made of, found from its modules and never from a list of model names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..errors import RequestError
from .quantization.packed import shapes_of


def find_blocks(model: nn.Module) -> list[nn.Module]:
    """The repeated blocks (layers) in order: children of every outermost ModuleList with more than parameters in it.

    A decoder gives its layers, an encoder-decoder those of both stacks; lists inside a block, such as separate
    experts, belong to the block.
    """
    blocks: list[nn.Module] = []
    for child in model.children():
        if isinstance(child, nn.ModuleList):
            blocks.extend(block for block in child if any(True for _ in block.parameters()))
        else:
            blocks.extend(find_blocks(child))
    return blocks


def find_task_head(model: Any) -> list[str]:
    """Modules, by name, that stand outside a model's base: what a task puts on it. A pooler is among them.

    The pooler of a BERT is trained for its own pre-training task, and not at all in many folders.

    Raises:
        RequestError: the model does not tell its base from what stands on it.
    """
    prefix = model.base_model_prefix
    if not hasattr(model, prefix):  # T5's form for questions
        rule = f"{type(model).__name__} has no base model apart from its head"
        raise RequestError.of("model.name_or_path", rule, "name an encoder, a decoder, or BART")
    heads = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    poolers = [f"{prefix}.{name}" for name, _ in getattr(model, prefix).named_children() if name == "pooler"]
    return [*poolers, *heads]


def find_linears(model: nn.Module) -> dict[str, nn.Linear | Conv1D]:
    """Linear layers by name inside the repeated blocks, without routers: what `all-linear` means.

    GPT-2's, which are called Conv1D, are among them; the head, which stands outside the blocks, and fused experts,
    which are no linear layers, are not.
    """
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    routers = {id(module) for module in find_routers(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear | Conv1D) and id(module) in inside and id(module) not in routers
    }


def find_routers(model: nn.Module) -> list[nn.Module]:
    """What chooses experts in each mixture, in order."""
    return [mixture.router for mixture in find_mixtures(model)]


def find_token_rows(model: nn.Module) -> dict[str, nn.Module]:
    """Modules by name that hold a row of their own for each token: the embeddings, and a head that is not tied."""
    whole: Any = model
    embeddings, head = whole.get_input_embeddings(), whole.get_output_embeddings()
    names = {id(module): name for name, module in model.named_modules()}
    found = {names[id(embeddings)]: embeddings}
    if head is not None and head.weight is not embeddings.weight:
        found[names[id(head)]] = head
    return found


@dataclass(frozen=True)
class Mixture:
    """A block whose tokens go through few of many experts.

    Inside it stand a router, with one row of a [experts, hidden] matrix for each expert, and the experts: one module
    with parameters of [experts, …, …] (fused), or a list of modules of the same shapes. Adapters may wrap both.
    """

    name: str  # of the module, in named_modules()
    layer: int  # which of find_blocks() it is in
    module: nn.Module
    router_name: str
    router: nn.Module  # what the block calls
    experts_name: str
    experts: nn.Module
    num_experts: int
    fused: bool


def find_buffers(model: nn.Module) -> dict[str, Tensor]:
    """What a model's files hold besides parameters, such as the correction bias of DeepSeek-V3's routers."""
    parameters = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    return {name: tensor for name, tensor in model.state_dict().items() if name not in parameters}


def find_mixtures(model: nn.Module) -> list[Mixture]:
    """The mixtures of experts of a model, in order; none of a dense one. Shared experts are no part of a mixture."""
    layers = {id(module): i for i, block in enumerate(find_blocks(model)) for module in block.modules()}
    found = []
    for name, module in model.named_modules():
        if id(module) in layers and not hasattr(module, "base_layer"):
            for child_name, child in module.named_children():
                shape = _experts_shape(child)
                routers = [
                    (other, sibling)
                    for other, sibling in module.named_children()
                    if sibling is not child and shape and _routes(sibling, *shape)
                ]
                if shape and len(routers) == 1:
                    router_name, router = routers[0]
                    prefix = f"{name}." if name else ""
                    found.append(
                        Mixture(
                            name, layers[id(module)], module, prefix + router_name, router, prefix + child_name, child,
                            shape[0], not isinstance(child, nn.ModuleList),
                        )
                    )  # fmt: skip
    return found


def unwrap(module: nn.Module) -> nn.Module:
    """The module that peft's adapters, or its copies to train, stand around."""
    while True:
        inner = getattr(module, "base_layer", None) or getattr(module, "original_module", None)
        if not isinstance(inner, nn.Module):
            return module
        module = inner


def _experts_shape(module: nn.Module) -> tuple[int, set[int]] | None:
    """How many experts `module` holds, and the sizes of their matrices; None where it holds none."""
    if isinstance(module, nn.ModuleList):
        shapes = [shapes_of(expert) for expert in module]
        alike = len(shapes) > 1 and bool(shapes[0]) and all(shape == shapes[0] for shape in shapes)
        return (len(shapes), {size for shape in shapes[0] for size in shape}) if alike else None
    inner = unwrap(module)
    if isinstance(inner, _ConvNd):  # its weight has three dimensions too
        return None
    fused = [shape for shape in shapes_of(inner, recurse=False) if len(shape) == 3]
    counts = {shape[0] for shape in fused}
    if len(counts) != 1 or counts == {1}:
        return None
    return counts.pop(), {size for shape in fused for size in shape[1:]}


def _routes(module: nn.Module, num_experts: int, sizes: set[int]) -> bool:
    """Whether `module` scores what experts of these sizes take in: a [experts, hidden] matrix of its own."""
    weight = getattr(unwrap(module), "weight", None)
    return isinstance(weight, nn.Parameter) and weight.ndim == 2 and weight.shape[0] == num_experts and (
        weight.shape[1] in sizes
    )  # fmt: skip


def find_norms(model: nn.Module) -> dict[str, nn.Module]:
    """Norms by name: modules of a class called so that have a weight for each feature of their own."""
    norms = {name: module for name, module in model.named_modules() if "Norm" in type(module).__name__}
    return {name: module for name, module in norms.items() if getattr(getattr(module, "weight", None), "ndim", 0) == 1}


@dataclass(frozen=True)
class SublayerEnd:
    """The linear layer that a sublayer's output comes from, before it is added to the residual."""

    name: str
    layer: Any  # nn.Linear, or transformers' Conv1D
    width: int  # of its output
    is_attention: bool  # else an MLP


def find_sublayer_ends(model: nn.Module) -> list[SublayerEnd]:
    """Where attention (self and cross) and MLP of each block end; empty if a block has a sublayer that ends otherwise.

    Attention is a module of a class called so; its last linear layer is its end. What linear layers stand outside
    attention are the block's MLP, and the last of them its end. A block with a router is a mixture of experts.
    """
    routers = {id(router) for router in find_routers(model)}
    names = {id(module): name for name, module in model.named_modules()}
    ends: list[SublayerEnd] = []
    for block in find_blocks(model):
        attentions = _outermost_attentions(block)
        groups = [(True, _linears_of(attention)) for attention in attentions]
        inside = {id(linear) for _, linears in groups for linear in linears}
        groups.append((False, [linear for linear in _linears_of(block) if id(linear) not in inside]))
        is_mixture = any(id(m) in routers or hasattr(m, "experts") for m in block.modules())
        if is_mixture or not attentions or not all(linears for _, linears in groups):
            return []
        for is_attention, linears in groups:
            last = linears[-1]
            ends.append(SublayerEnd(names[id(last)], last, _output_width(last), is_attention))
    return ends


def _outermost_attentions(module: nn.Module) -> list[nn.Module]:
    found: list[nn.Module] = []
    for child in module.children():
        is_attention = "Attention" in type(child).__name__ and _linears_of(child)
        found.extend([child] if is_attention else _outermost_attentions(child))
    return found


def _linears_of(module: nn.Module) -> list[nn.Module]:
    return [m for m in module.modules() if isinstance(m, nn.Linear | Conv1D)]


def _output_width(linear: nn.Module) -> int:
    width = linear.out_features if isinstance(linear, nn.Linear) else linear.nf
    assert isinstance(width, int)
    return width
