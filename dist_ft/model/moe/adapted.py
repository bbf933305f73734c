"""LoRA on fused experts without keeping a merged copy of their weights for every layer.

peft merges the adapter of a parameter into its weight for each forward, and autograd keeps the merged weight for the
backward: 55 GB on each GPU if all layers of Qwen3-30B-A3B are adapted. Here, the merged weight exists only while its
layer computes, and is recomputed bit for bit in the backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..quantization.lease import Lease


def merge_on_demand(model: nn.Module) -> None:
    """Make peft's adapters of fused experts recompute the merged weight in the backward, with identical results."""
    for module in model.modules():
        if type(module) is ParamWrapper and int(module.num_experts) > 1:  # type: ignore[arg-type]
            module.__class__ = MergedOnDemand


class MergedOnDemand(ParamWrapper):
    """peft's wrapper of a parameter `[experts, ..., ...]`, whose merged weight is recomputed in the backward."""

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Merge the adapters into the parameter during a forward."""
        with super()._activate_lora(active_adapters):
            experts, name = self.get_base_layer(), self.parameter_name
            if name not in getattr(experts, "parametrizations", {}):  # no adapter is active
                yield
                return
            lease = Lease(lambda _: self._merge(active_adapters))
            lease.weights[name] = getattr(experts, name)  # with its graph; `parametrize` keeps it for this forward
            with lease:
                yield

    def _merge(self, adapters: list[str]) -> Tensor:
        """Return the weight of the forward, by the operation of peft's `_LoraFactorsProxy`."""
        weight: Tensor = self.get_param()
        with torch.autocast(weight.device.type, enabled=False):
            for adapter in adapters:
                lhs, rhs, scaling = self.get_delta_factors(adapter)
                weight = torch.baddbmm(weight, lhs, rhs, alpha=scaling)
        return weight
