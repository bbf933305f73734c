"""What methods by peft share: names that must match something, and an export in peft's form."""

from __future__ import annotations

import difflib
from pathlib import Path

import peft
from torch import nn

from ..config.method import MethodChoice
from ..errors import Problem, RequestError
from ..state import Weights


class ThroughPeft:
    """A method whose trained tensors have a place in peft's adapter file."""

    config: MethodChoice

    def export(self, model: nn.Module, weights: Weights, out: Path) -> None:
        """Write adapter_model.safetensors and adapter_config.json in peft's form."""
        state = {name: tensor.detach().cpu().contiguous() for name, tensor in weights}
        assert isinstance(model, peft.PeftModel)
        # The embeddings are either untouched or in modules_to_save; peft must not go and look at the hub for them.
        model.save_pretrained(str(out), state_dict=state, save_embedding_layers=False)


TASK_TYPES = {  # by the ending of the model's class; peft gives each a wrapper of its own
    "ForSequenceClassification": peft.TaskType.SEQ_CLS,
    "ForTokenClassification": peft.TaskType.TOKEN_CLS,
    # peft 0.21's wrapper for QUESTION_ANS takes token_type_ids and does not hand them on; this one hands on everything.
    "ForQuestionAnswering": peft.TaskType.FEATURE_EXTRACTION,
    "ForConditionalGeneration": peft.TaskType.SEQ_2_SEQ_LM,
    "EncoderDecoderModel": peft.TaskType.SEQ_2_SEQ_LM,
    "ForMaskedLM": peft.TaskType.FEATURE_EXTRACTION,
}


def task_type_of(model: nn.Module) -> peft.TaskType:
    """What peft calls a model of this kind."""
    name = type(model).__name__
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), peft.TaskType.CAUSAL_LM)


def check_names(key: str, wanted: list[str], model: nn.Module, usual: list[str]) -> None:
    """Each of `wanted` must be a module's name or an end of one, at a dot; `usual` is shown where none is near."""
    problems = []
    names = [name for name, _ in model.named_modules() if name]
    endings = sorted({name.rsplit(".", 1)[-1] for name in names})
    for want in wanted:
        if not any(name == want or name.endswith("." + want) for name in names):
            near = difflib.get_close_matches(want, endings, n=3) or usual or [e for e in endings if not e.isdigit()]
            problems.append(Problem(key, f"{want!r} matches no module", f"the model has {', '.join(near[:12])}"))
    if problems:
        raise RequestError(*problems)
