"""P-tuning by peft (Liu et al. 2021, arXiv 2103.10385): a small network computes embeddings before every row."""

from __future__ import annotations

import peft
from torch import nn

from ..config.method import PTuningConfig
from ..state import Anatomy
from .through_peft import task_type_of
from .virtual_tokens import STACKS, VirtualTokens, put_in_front


class PTuning(VirtualTokens):
    """The method `p_tuning`; the network is an MLP."""

    config: PTuningConfig

    def __init__(self, config: PTuningConfig) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and prepend the network's output to its input embeddings."""
        return put_in_front(
            anatomy,
            peft.PromptEncoderConfig(
                task_type=task_type_of(anatomy.model),
                num_virtual_tokens=self.config.num_virtual_tokens,
                num_transformer_submodules=STACKS,
                encoder_hidden_size=self.config.encoder_hidden_size,
                encoder_dropout=self.config.encoder_dropout,
            ),
        )
