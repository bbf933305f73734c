"""Full fine-tuning: every weight learns."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from ..schema_method import FullConfig, MethodChoice
from ..state import Weights


class Full:
    """See the module."""

    config: MethodChoice

    def __init__(self, config: FullConfig) -> None:
        self.config = config

    def apply(self, model: nn.Module) -> nn.Module:
        """The same model, all parameters trainable."""
        return model.requires_grad_(True)

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write a model folder; `weights` are consumed one by one, `model` gives configuration and names."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        model.save_pretrained(out, state_dict=state)  # type: ignore[operator]  # shards by itself, safetensors
