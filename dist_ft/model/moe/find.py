"""The mixtures of experts of a model."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel

from ...state import Mixture
from ..miniature import NUM_EXPERTS, TOP_K
from ..quantization.packed import shapes_of
from .choices import Observed, observe_routers
from .structure import find_experts, find_routers, has_experts

UNPROVEN = "no small model of its class could be computed"


def find_mixtures(model: nn.Module, blocks: Sequence[str]) -> tuple[list[Mixture], str | None]:
    """Return the mixtures of experts in order.

    Returns:
        The mixtures, and the entry of the configuration that says that the model has experts, if no router was found.
        The mixtures are empty for a dense model.
    """
    config = getattr(model, "config", None)
    marks = _counts(config, NUM_EXPERTS, least=2) if isinstance(config, PreTrainedConfig) else {}
    if not marks and not has_experts(model, blocks):
        return [], None
    observed = observe_routers(model) if isinstance(model, PreTrainedModel) else None
    routers = dict.fromkeys(find_routers(model, blocks, nested=True)) if observed is None else observed
    found = [mixture for name in _in_order(model, routers) if (mixture := _mixture(model, blocks, name, routers[name]))]
    if found or observed is not None or not marks:
        return found, None
    return [], ", ".join(f"{key}={count}" for key, count in marks.items())


def _in_order(model: nn.Module, names: Any) -> list[str]:
    return [name for name, _ in model.named_modules() if name in names]


def _mixture(model: nn.Module, blocks: Sequence[str], router: str, seen: Observed | None) -> Mixture | None:
    layer = next((i for i, block in enumerate(blocks) if router.startswith(f"{block}.")), None)
    if layer is None:
        return None
    weight = model.get_parameter(seen.weight) if seen else None
    rows = max(shape[0] for shape in shapes_of(model.get_submodule(router)) if len(shape) == 2)
    experts = find_experts(model, router, blocks[layer], rows if weight is None else weight.shape[0])
    if experts is None:
        return None
    usual = next(iter(_counts(getattr(model, "config", None), TOP_K, least=1).values()), experts.number)
    top_k = seen.top_k if seen and seen.form else usual
    parts = (experts.home, layer, router, experts.names, experts.number, top_k, experts.fused)
    return Mixture(*parts, seen.form, seen.why_unmeasured) if seen else Mixture(*parts, None, UNPROVEN)


def _counts(config: Any, pattern: str, least: int) -> dict[str, int]:
    """Return the integers from `least` of a configuration, and of those that it consists of, by their keys."""
    found: dict[str, int] = {}
    for key, value in vars(config).items() if isinstance(config, PreTrainedConfig) else ():
        if isinstance(value, PreTrainedConfig):
            found |= _counts(value, pattern, least)
        elif re.fullmatch(pattern, key) and isinstance(value, int) and value >= least:
            found[key] = value
    return found
