"""Full fine-tuning: every weight learns."""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor, nn

from ..config.method import MethodChoice
from ..state import Anatomy, Weights
from .shards import write_model


class Full:
    """See the module."""

    def __init__(self, config: MethodChoice) -> None:
        self.config = config
        self.buffers: dict[str, Tensor] = {}  # as loaded: nothing here trains them, and `weights` has none

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """The same model, all parameters trainable."""
        self.keep_buffers(anatomy)
        return anatomy.model.requires_grad_(True)

    def keep_buffers(self, anatomy: Anatomy) -> None:
        """Remember the buffers that a folder holds (such as a router's correction bias), for the export."""
        buffers = anatomy.buffers()
        if not any(tensor.is_meta for tensor in buffers.values()):
            self.buffers = {name: tensor.detach().cpu().clone() for name, tensor in buffers.items()}

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write a model folder; `weights` are consumed one by one, `model` gives configuration and names."""
        write_model(model, itertools.chain(weights, self.buffers.items()), out)


def train_head(anatomy: Anatomy) -> None:
    """Have the task's head learn, if it has one that begins anew."""
    for head in anatomy.parts(anatomy.task_head):
        head.requires_grad_(True)
