"""Prefix tuning by peft (Li and Liang 2021, arXiv 2101.00190): trained keys and values before every row."""

from __future__ import annotations

import peft
from torch import nn

from ..config.method import PrefixConfig
from ..state import Anatomy
from .through_peft import task_type_of
from .virtual_tokens import VirtualTokens, put_in_front


class Prefix(VirtualTokens):
    """The method `prefix`."""

    config: PrefixConfig

    def __init__(self, config: PrefixConfig) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and prepend trained keys and values to those of every layer."""
        return put_in_front(
            anatomy,
            peft.PrefixTuningConfig(
                task_type=task_type_of(anatomy.model),
                num_virtual_tokens=self.config.num_virtual_tokens,
                prefix_projection=self.config.prefix_projection,
                encoder_hidden_size=self.config.encoder_hidden_size,
            ),
        )
