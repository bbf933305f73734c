"""The record of a packed parameter: its scheme and the shape of its weight."""

from __future__ import annotations

from typing import NamedTuple

from torch import nn


class Packed(NamedTuple):
    """Description of the weight of a packed parameter; modules have one per packed parameter in `packed`."""

    scheme: str  # nf4 or int8
    shape: tuple[int, ...]  # of the weight


def find_packed(model: nn.Module) -> dict[str, Packed]:
    """Return the parameters that hold packed bits, by full name."""
    return {
        f"{name}.{parameter}" if name else parameter: entry
        for name, module in model.named_modules()
        for parameter, entry in getattr(module, "packed", {}).items()
    }


def shapes_of(module: nn.Module, *, recurse: bool = True) -> list[tuple[int, ...]]:
    """Return the shapes of a module's parameters; for a packed parameter, that of its weight."""
    packed = find_packed(module)
    return [
        packed[name].shape if name in packed else tuple(p.shape) for name, p in module.named_parameters(recurse=recurse)
    ]
