"""Common base of prompt, prefix and P-tuning: an encoder computes trained positions that precede every row."""

from __future__ import annotations

import inspect
from pathlib import Path

import peft
import torch
from torch import nn

from ..config.method import VirtualTokensChoice
from ..errors import RequestError
from ..state import Anatomy, Weights
from .through_peft import task_type_of

ENCODER = "prompt_encoder.default."
# Embeddings precede only the source of an encoder-decoder; peft would keep another set that nothing reads.
STACKS = 1
OTHER_METHOD = "set method=lora, adapter or ia3"


class VirtualTokens:
    """A method whose export holds the output of its encoder, `prompt_embeddings`, and not the encoder itself."""

    config: VirtualTokensChoice

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's format."""
        assert isinstance(model, peft.PeftModel)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        learned = {name: state.pop(name) for name in list(state) if name.startswith(ENCODER)}  # the rest is a head
        encoder = model.prompt_encoder["default"].to_empty(device="cpu")
        encoder.load_state_dict({name.removeprefix(ENCODER): tensor for name, tensor in learned.items()})
        model.prompt_tokens["default"] = torch.arange(self.config.num_virtual_tokens)
        encoder.eval()  # without the encoder's dropout
        model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)


def put_in_front(anatomy: Anatomy, settings: peft.PromptLearningConfig) -> nn.Module:
    """Freeze the model except a new head, and let peft prepend trained positions to every row.

    Raises:
        RequestError: peft does not support this type of model, or supports it incorrectly.
    """
    model, task_head = anatomy.model, list(anatomy.task_head)
    kind, is_prefix = type(model).__name__, isinstance(settings, peft.PrefixTuningConfig)
    settings.modules_to_save = task_head or None
    if "score" in task_head and task_type_of(model) == peft.TaskType.SEQ_CLS and not is_prefix:
        # GenericForSequenceClassification finds the last token by its id, or without ids uses the last position.
        rule = f"{kind} receives embeddings instead of token ids and would read the class of shorter rows from padding"
        raise RequestError.of("method.name", rule, f"set method=prefix; or {OTHER_METHOD}")
    if is_prefix and not _takes_cache(model):
        raise RequestError.of("method.name", f"{kind} does not accept past_key_values", OTHER_METHOD)
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise RequestError.of("method.name", f"peft does not support it for {kind} ({error})", OTHER_METHOD) from error


def _takes_cache(model: nn.Module) -> bool:
    """Whether the forward of the model, or of its base model, accepts `past_key_values`, which peft passes."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return any("past_key_values" in inspect.signature(part.forward).parameters for part in (model, inner))
