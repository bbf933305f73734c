"""What methods by peft share: names that must match a module, and the export in peft's format."""

from __future__ import annotations

import difflib
from pathlib import Path

import peft
from torch import nn

from ..config.method import MethodChoice
from ..errors import Problem, RequestError
from ..state import Weights


class ThroughPeft:
    """A method whose trained tensors are stored in peft's adapter file."""

    config: MethodChoice

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's format."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        assert isinstance(model, peft.PeftModel)
        # Embeddings are either unchanged or in modules_to_save; peft must not look them up on the Hub.
        model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)


TASK_TYPES = {  # by the suffix of the model's class name; peft has a wrapper for each
    "ForSequenceClassification": peft.TaskType.SEQ_CLS,
    "ForTokenClassification": peft.TaskType.TOKEN_CLS,
    # peft 0.21's wrapper for QUESTION_ANS drops token_type_ids; this one passes everything on.
    "ForQuestionAnswering": peft.TaskType.FEATURE_EXTRACTION,
    "ForConditionalGeneration": peft.TaskType.SEQ_2_SEQ_LM,
    "EncoderDecoderModel": peft.TaskType.SEQ_2_SEQ_LM,
    "ForMaskedLM": peft.TaskType.FEATURE_EXTRACTION,
}


def task_type_of(model: nn.Module) -> peft.TaskType:
    """Return peft's task type for a model."""
    name = type(model).__name__
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), peft.TaskType.CAUSAL_LM)


def check_names(key: str, wanted: list[str], model: nn.Module, usual: list[str]) -> None:
    """Check that each of `wanted` is a module name or the end of one after a dot.

    Args:
        key: Of the configuration, for the error.
        wanted: Names to check.
        model: The model.
        usual: Names to suggest if none is similar.

    Raises:
        RequestError: With a problem for each name that matches no module.
    """
    problems = []
    names = [name for name, _ in model.named_modules() if name]
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    for want in wanted:
        if not any(name == want or name.endswith("." + want) for name in names):
            near = difflib.get_close_matches(want, endings, n=3) or usual or [e for e in endings if not e.isdigit()]
            problems.append(Problem(key, f"{want!r} matches no module", f"the model has {', '.join(near[:12])}"))
    if problems:
        raise RequestError(*problems)
