"""Experts and routers in a model's modules, found by the shapes of their parameters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from torch import nn
from torch.nn.modules.conv import _ConvNd
from transformers.pytorch_utils import Conv1D

from ..quantization.packed import shapes_of
from ..reach import lies_in


class Experts(NamedTuple):
    """The experts that a router chooses from."""

    home: str  # module that contains the router and the experts
    names: tuple[str, ...]
    number: int
    fused: bool


def find_experts(model: nn.Module, router: str, block: str, outputs: int) -> Experts | None:
    """Return the experts of a router: those in the innermost module around it that has any.

    Args:
        model: The model.
        router: Name of the router.
        block: Name of the block that contains it.
        outputs: Number of the router's logits, which tells the number of experts where shapes do not.
    """
    home = router
    while home != block:
        home = home.rpartition(".")[0]
        if counts := dict(_experts_in(model.get_submodule(home), home, router)):
            names = tuple(name for name, count in counts.items() if count == max(counts.values()))  # not shared experts
            lists = isinstance(model.get_submodule(names[0]), nn.ModuleList | nn.ModuleDict)
            return Experts(home, names, max(counts.values()), fused=not lists)
    home = router.rpartition(".")[0]
    flat = dict(_flat_experts_in(model.get_submodule(home), home, router, outputs))
    return Experts(home, tuple(flat), max(flat.values()), fused=True) if flat else None


def block_of(name: str) -> str:
    """Return the name up to the first number in it, which is that of a block; empty if there is none."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[: first + 1])


def has_experts(model: nn.Module, blocks: Sequence[str]) -> bool:
    """Return whether a block contains modules that look like experts."""
    return any(count_experts(module) for block in blocks for module in model.get_submodule(block).modules())


def count_experts(module: nn.Module) -> int:
    """Return the number of experts in a module with `[experts, ..., ...]` parameters or of alike modules; else 0."""
    if isinstance(module, nn.ModuleList | nn.ModuleDict):
        shapes = [shape for expert in module.children() if (shape := shapes_of(expert))]  # dropout has none
        alike = len(shapes) > 1 and any(len(shape) > 1 for shape in shapes[0]) and all(s == shapes[0] for s in shapes)
        return len(shapes) if alike else 0
    if isinstance(module, _ConvNd):  # its weight has three dimensions too
        return 0
    counts = {shape[0] for shape in shapes_of(module, recurse=False) if len(shape) == 3}
    return max(counts) if counts and min(counts) > 1 else 0


def find_routers(model: nn.Module, blocks: Sequence[str], *, nested: bool) -> list[str]:
    """Return the names of modules beside experts that have a matrix of one row per expert.

    A router whose own weight is that matrix comes before one that contains it in another module: shared experts can be
    as wide as there are experts. The latter are found only if `nested`.
    """
    found: list[str] = []
    for block in blocks:
        for home, module in model.get_submodule(block).named_modules(prefix=block):
            for experts in module.children():
                count = count_experts(experts)
                others = [other for other, child in module.named_children() if child is not experts]
                for recurse in (False, True)[: 1 + nested] if count else ():
                    fits = [o for o in others if _has_row_per_expert(getattr(module, o), count, recurse=recurse)]
                    if len(fits) == 1:
                        found.append(f"{home}.{fits[0]}")
                    if fits:
                        break
    return found


def _has_row_per_expert(module: nn.Module, count: int, *, recurse: bool) -> bool:
    if isinstance(module, nn.Embedding):
        return False
    return any(len(shape) == 2 and shape[0] == count for shape in shapes_of(module, recurse=recurse))


def _experts_in(module: nn.Module, home: str, router: str) -> Iterator[tuple[str, int]]:
    """Yield the outermost modules that look like experts, with their number, outside the router."""
    for name, child in module.named_children():
        full = f"{home}.{name}"
        if lies_in(full, [router]):
            continue
        if count := count_experts(child):
            yield full, count
        else:
            yield from _experts_in(child, full, router)


def _flat_experts_in(module: nn.Module, home: str, router: str, outputs: int) -> Iterator[tuple[str, int]]:
    """Yield modules with matrices of the rows of all experts: embeddings, and others than linear or convolutional."""
    for name, child in module.named_modules(prefix=home):
        if lies_in(name, [router]) or isinstance(child, nn.Linear | Conv1D | _ConvNd):
            continue
        rows = [shape[0] for shape in shapes_of(child, recurse=False) if len(shape) == 2]
        if rows:
            yield name, max(rows) if isinstance(child, nn.Embedding) else outputs
