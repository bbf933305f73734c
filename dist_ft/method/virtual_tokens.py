"""What prompt, prefix and P-tuning share: an encoder beside the frozen model gives what stands in front of a row."""

from __future__ import annotations

from pathlib import Path

import peft
import torch
from torch import nn

from ..schema_method import VirtualTokensChoice
from ..state import Weights

ENCODER = "prompt_encoder.default."


class VirtualTokens:
    """A method whose export holds what its encoder gives, `prompt_embeddings`, and not the encoder itself."""

    config: VirtualTokensChoice

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's form."""
        assert isinstance(model, peft.PeftModel)
        state = {name.removeprefix(ENCODER): tensor.detach().cpu() for name, tensor in weights}
        encoder = model.prompt_encoder["default"].to_empty(device="cpu")
        encoder.load_state_dict(state)
        model.prompt_tokens["default"] = torch.arange(self.config.num_virtual_tokens)
        encoder.eval()  # without the encoder's dropout
        model.save_pretrained(str(out), save_embedding_layers=False)
