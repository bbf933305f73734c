"""Prompt tuning by peft (Lester et al. 2021, arXiv 2104.08691): trained input embeddings before every row."""

from __future__ import annotations

from typing import Any

import peft
from torch import nn

from ..config.method import PromptConfig
from ..state import Anatomy
from .through_peft import task_type_of
from .virtual_tokens import STACKS, VirtualTokens, put_in_front


class Prompt(VirtualTokens):
    """The method `prompt`."""

    config: PromptConfig

    def __init__(self, config: PromptConfig) -> None:
        self.config = config

    def apply(self, anatomy: Anatomy) -> nn.Module:
        """Freeze the model and prepend trained embeddings to its input embeddings."""
        settings: dict[str, Any] = {}
        if self.config.prompt_tuning_init == "TEXT":
            own = anatomy.model.config._name_or_path  # type: ignore[union-attr]
            settings = {
                "prompt_tuning_init_text": self.config.prompt_tuning_init_text,
                "tokenizer_name_or_path": self.config.tokenizer_name_or_path or own,
            }
        return put_in_front(
            anatomy,
            peft.PromptTuningConfig(
                task_type=task_type_of(anatomy.model),
                num_virtual_tokens=self.config.num_virtual_tokens,
                num_transformer_submodules=STACKS,
                prompt_tuning_init=self.config.prompt_tuning_init,
                **settings,
            ),
        )
