"""What prompt, prefix and P-tuning share: an encoder beside the frozen model gives what stands in front of a row."""

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
# Embeddings stand in front of an encoder-decoder's source alone; peft would keep as many again that nothing reads.
STACKS = 1
OTHER_METHOD = "choose method=lora, adapter or ia3"


class VirtualTokens:
    """A method whose export holds what its encoder gives, `prompt_embeddings`, and not the encoder itself."""

    config: VirtualTokensChoice

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's form."""
        assert isinstance(model, peft.PeftModel)
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        learned = {name: state.pop(name) for name in list(state) if name.startswith(ENCODER)}  # what is left is a head
        encoder = model.prompt_encoder["default"].to_empty(device="cpu")
        encoder.load_state_dict({name.removeprefix(ENCODER): tensor for name, tensor in learned.items()})
        model.prompt_tokens["default"] = torch.arange(self.config.num_virtual_tokens)
        encoder.eval()  # without the encoder's dropout
        model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)


def put_in_front(anatomy: Anatomy, settings: peft.PromptLearningConfig) -> nn.Module:
    """Freeze the model but for a new head, which is saved along, and have peft put what learns in front of every row.

    Raises:
        RequestError: peft cannot do so with this kind of model, or it would go wrong in silence.
    """
    model, task_head = anatomy.model, list(anatomy.task_head)
    kind, is_prefix = type(model).__name__, isinstance(settings, peft.PrefixTuningConfig)
    settings.modules_to_save = task_head or None
    if "score" in task_head and task_type_of(model) == peft.TaskType.SEQ_CLS and not is_prefix:
        # GenericForSequenceClassification finds the last token by its id, and takes the last place where it has none.
        rule = f"{kind} gets embeddings in place of tokens, and would read the class from the padding of shorter rows"
        raise RequestError.of("method.name", rule, f"choose method=prefix; or {OTHER_METHOD}")
    if is_prefix and not _takes_cache(model):
        raise RequestError.of("method.name", f"{kind} takes no keys and values from outside", OTHER_METHOD)
    try:
        return peft.get_peft_model(model, settings)
    except ValueError as error:
        raise RequestError.of("method.name", f"peft cannot do it with {kind} ({error})", OTHER_METHOD) from error


def _takes_cache(model: nn.Module) -> bool:
    """Whether the model, or what stands below its head, is called with `past_key_values`, as peft calls it."""
    inner = getattr(model, getattr(model, "base_model_prefix", ""), model)
    return any("past_key_values" in inspect.signature(part.forward).parameters for part in (model, inner))
