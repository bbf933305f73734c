"""What a model is made of, found from its modules and never from a list of model names."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


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


def find_linears(model: nn.Module) -> dict[str, nn.Linear]:
    """Linear layers by name inside the repeated blocks, without routers: what `all-linear` means.

    The head stands outside the blocks. A router is a linear layer with one output an expert, beside the experts.
    """
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    routers = {id(module) for module in find_routers(model)}
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and id(module) in inside and id(module) not in routers
    }


def find_routers(model: nn.Module) -> list[nn.Module]:
    """Linear layers that choose experts: direct children of a module that also has a child of several experts."""
    config = getattr(model, "config", None)
    counts = {getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts")} - {None}
    return [
        child
        for module in model.modules()
        if hasattr(module, "experts")
        for child in module.children()
        if isinstance(child, nn.Linear) and child.out_features in counts
    ]


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
