"""Full fine-tuning: every weight is trained."""

from __future__ import annotations

import itertools
from pathlib import Path

from torch import Tensor, nn

from ..config.method import MethodChoice
from ..model.reach import lies_in
from ..state import Anatomy, Weights
from .shards import write_model


class Full:
    """The method `full`, and the base of methods that train a part of the model's own weights."""

    def __init__(self, config: MethodChoice) -> None:
        self.config = config
        self.buffers: dict[str, Tensor] = {}  # as loaded; buffers are not trained, and engines stream only parameters

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Make all parameters trainable that text reaches."""
        self.keep_buffers(anatomy)
        model = anatomy.model.requires_grad_(True)
        freeze_idle(anatomy)
        return model

    def keep_buffers(self, anatomy: Anatomy) -> None:
        """Keep the persistent buffers (such as a router's correction bias) for the export."""
        buffers = anatomy.buffers()
        if not any(tensor.is_meta for tensor in buffers.values()):
            self.buffers = {name: tensor.detach().cpu().clone() for name, tensor in buffers.items()}

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write a model folder; `weights` are consumed one by one, `model` provides configuration and names."""
        write_model(model, itertools.chain(weights, self.buffers.items()), out)


def freeze_idle(anatomy: Anatomy) -> None:
    """Freeze the parts that text does not reach: they get no gradient, and DDP would wait for one."""
    for name, parameter in anatomy.model.named_parameters():
        if lies_in(name, anatomy.idle):
            parameter.requires_grad_(False)


def train_head(anatomy: Anatomy) -> None:
    """Make the randomly initialized modules of the task trainable."""
    for head in anatomy.parts(anatomy.task_head):
        head.requires_grad_(True)
