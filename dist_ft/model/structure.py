"""What a model is made of, found from its modules and never from a list of model names."""

from __future__ import annotations

from torch import nn


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
