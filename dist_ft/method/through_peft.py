"""Common parts of the methods by peft: names that must match a module, and the export in peft's format."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path

import peft
from torch import nn

from ..config.method import MethodChoice
from ..errors import Problem, RequestError
from ..model.reach import lies_in
from ..state import Anatomy, Weights


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
    if name.endswith("ForConditionalGeneration") and not model.config.is_encoder_decoder:  # type: ignore[union-attr]
        return peft.TaskType.CAUSAL_LM  # a decoder that is conditioned on images
    return next((kind for ending, kind in TASK_TYPES.items() if name.endswith(ending)), peft.TaskType.CAUSAL_LM)


def check_names(key: str, wanted: list[str], model: nn.Module, usual: list[str]) -> None:
    """Check that each of `wanted` is a module name or the end of one after a dot.

    Args:
        key: Configuration key, for the error.
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


def keep_to_text(key: str, wanted: str | list[str], anatomy: Anatomy, names: Iterable[str] = ()) -> str | list[str]:
    """Restrict the targets for peft to modules (or parameters) that text reaches.

    Args:
        key: Configuration key, for the error.
        wanted: Ends of names after a dot, or a regular expression for full names, as in peft.
        anatomy: Anatomy of the model.
        names: Names that `wanted` is matched against; by default, the names of all modules.

    Returns:
        `wanted`, or, if it also matches parts that text does not reach, the full names of the other matches.

    Raises:
        RequestError: With a problem for each entry that matches only parts that text does not reach.
    """
    if not anatomy.idle:
        return wanted
    candidates = list(names) or [name for name, _ in anatomy.model.named_modules()]
    problems = []
    for entry in [wanted] if isinstance(wanted, str) else [[ending] for ending in wanted]:
        meant = [name for name in candidates if _is_meant(name, entry)]
        if meant and all(lies_in(name, anatomy.idle) for name in meant):
            rule = f"{''.join(entry)!r} means only parts that no text reaches, such as {meant[0]}"
            problems.append(Problem(key, rule, "remove it, or name parts of the language model"))
    if problems:
        raise RequestError(*problems)
    meant = [name for name in candidates if _is_meant(name, wanted)]
    reached = [name for name in meant if not lies_in(name, anatomy.idle)]
    return wanted if len(reached) == len(meant) else reached


def _is_meant(name: str, wanted: str | list[str]) -> bool:
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    return any(name == want or name.endswith(f".{want}") for want in wanted)
