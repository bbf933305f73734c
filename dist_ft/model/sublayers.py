"""The last linear layers of the sublayers of a block, after which bottleneck adapters are inserted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from ..state import Anatomy


@dataclass(frozen=True)
class SublayerEnd:
    """The linear layer whose output a sublayer adds to the residual stream."""

    name: str
    layer: Any  # nn.Linear, or transformers' Conv1D
    width: int  # of its output
    is_attention: bool  # else an MLP


def find_sublayer_ends(anatomy: Anatomy) -> list[SublayerEnd]:
    """Return the last linear layers of attention (self and cross) and of the MLP of each block.

    Attention is a module whose class name contains "Attention"; its last linear layer is its end. The linear layers
    outside attention are the block's MLP, and the last of them is its end.

    Returns:
        The ends in order; empty if a block has a sublayer that does not end in a linear layer, such as a mixture of
        experts.
    """
    mixtures = {mixture.layer for mixture in anatomy.mixtures}
    names = {id(module): name for name, module in anatomy.model.named_modules()}
    ends: list[SublayerEnd] = []
    for number, block in enumerate(anatomy.parts(anatomy.blocks)):
        attentions = _outermost_attentions(block)
        groups = [(True, _linears_of(attention)) for attention in attentions]
        inside = {id(linear) for _, linears in groups for linear in linears}
        groups.append((False, [linear for linear in _linears_of(block) if id(linear) not in inside]))
        is_mixture = number in mixtures or any(hasattr(m, "experts") for m in block.modules())
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
