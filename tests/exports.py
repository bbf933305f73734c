"""Trained tiny models with the arguments of their export."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from dist_ft.config.model import ModelConfig
from dist_ft.export.probe import Deviation, probe_model
from dist_ft.export.write import export_run
from dist_ft.method.full import Full
from dist_ft.model.anatomy import find_anatomy
from tests.samples import given, on_meta

TOKENS = list(range(5, 45))
LORAS: list[dict[str, Any]] = [  # settings of LoRA that change what is exported
    {},
    {"use_dora": True},
    {"use_rslora": True},
    {"modules_to_save": ["lm_head"]},
    {"modules_to_save": ["embed_tokens"]},
    {"target_modules": ["q_proj", "embed_tokens"]},
]


def train_a_little(model: nn.Module) -> nn.Module:
    """Add noise to all trainable weights, including LoRA's B, which starts at zero."""
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.05 * torch.randn_like(parameter)
    return model.eval()


class Case:
    """Trained tiny model with the arguments of its export."""

    def __init__(self, folder: Path, out: Path, method: Any, dtype: str = "float32") -> None:
        self.folder, self.out, self.method = folder, out, method
        self.config = ModelConfig(name_or_path=str(folder), dtype=dtype)
        self.model = train_a_little(self.build(True))
        self.is_adapter = not isinstance(method, Full)

    def build(self, weights: bool) -> nn.Module:
        dtype = getattr(torch, self.config.dtype)
        base = (
            AutoModelForCausalLM.from_pretrained(self.folder, dtype=dtype)
            if weights
            else AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(self.folder), dtype=dtype)
        )
        base.config.use_cache = False
        model = self.method.apply(find_anatomy(base))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
        return model

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not self.is_adapter:
                yield name, parameter.data

    def export(self, **changes: Any) -> Deviation | None:
        arguments = {
            "method": self.method,
            "model_config": self.config,
            "model_dir": str(self.folder),
            "bare": on_meta(self.build),
            "tokenizer": AutoTokenizer.from_pretrained(self.folder),
            "end_token_id": 2,
            "weights": self.weights(),
            "out": self.out,
            "card": "# card\n",
            "probe": changes.get("probe") or probe_model(self.model, given(TOKENS)),
        }
        return export_run(**{**arguments, **changes})
