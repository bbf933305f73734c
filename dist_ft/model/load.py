"""Loading a model in the form that its task needs: weights on one rank, the same modules without on the others."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..config.model import ModelConfig
from ..errors import Problem, RequestError
from ..state import Anatomy, Architecture
from .anatomy import find_anatomy
from .attention import AttentionChoice, choose_attention
from .noise import set_dropout
from .quantize import quantize_parts
from .vocabulary import grow, grow_settings


def load_config(config: ModelConfig, folder: str) -> PreTrainedConfig:
    """The architecture's configuration.

    Raises:
        RequestError: there is none that transformers reads.
    """
    try:
        return AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError.of(
            "model.name_or_path", f"{folder}: {_first_line(error)}", "name a folder or hub id of a transformers model"
        ) from error


def attention_of(config: ModelConfig, folder: str, device: torch.device, architecture: Architecture) -> AttentionChoice:
    """What `model.attn_implementation` becomes for this model on this device."""
    return choose_attention(
        config.attn_implementation, _model_class(config, folder, architecture), device, getattr(torch, config.dtype)
    )


def load_model(
    config: ModelConfig, folder: str, attention: AttentionChoice, architecture: Architecture, *, weights: bool
) -> Anatomy:
    """Load the model on the CPU in `config.dtype`, quantized as `config.quantization` says.

    A new head is initialized from torch's generator.

    Args:
        config: The `model` group.
        folder: The model's files.
        attention: The attention implementation.
        architecture: What the task needs of the model.
        weights: If false, modules and buffers are the same and parameters are uninitialized memory, which the operating
            system does not allocate before it is written: ranks that receive their weights later need none here.

    Returns:
        The model with its parts.

    Raises:
        RequestError: Weights are missing, have other shapes, or belong to another architecture.
    """
    settings = load_config(config, folder)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    for key, value in architecture.overrides.items():
        setattr(settings, key, value)
    options: dict[str, Any] = {
        "attn_implementation": attention.implementation,
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
    }
    if weights and config.from_scratch:
        grow_settings(settings, architecture)
        model = auto_class(architecture).from_config(settings, **options)  # which draws them from torch's generator
    elif weights:
        model = _read(config, folder, architecture, {**options, "config": settings})
        grow(model, architecture)
    else:
        grow_settings(settings, architecture)
        with no_init_weights():
            model = auto_class(architecture).from_config(settings, **options)
        model.tie_weights()
    if not weights or config.from_scratch:
        _settle_generation(model, config, folder)
    task_head = find_task_head(model) if architecture.new_head else ()
    anatomy = find_anatomy(model, task_head=task_head, new_token_ids=architecture.new_token_ids)
    if config.quantization not in (None, "none"):
        quantize_parts(anatomy, config.quantization, options["dtype"], weights=weights)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return anatomy


def find_task_head(model: Any) -> list[str]:
    """Return the names of the modules outside a model's base: what a task puts on it. A pooler is among them.

    The pooler of a BERT is trained for its own pre-training task, and not at all in many folders.

    Raises:
        RequestError: The model does not separate its base from its head.
    """
    prefix = model.base_model_prefix
    if not hasattr(model, prefix):  # T5ForQuestionAnswering
        rule = f"{type(model).__name__} has no base model that is separate from its head"
        raise RequestError.of("model.name_or_path", rule, "use an encoder, a decoder, or BART")
    heads = [name for name, child in model.named_children() if name != prefix and any(True for _ in child.parameters())]
    poolers = [f"{prefix}.{name}" for name, _ in getattr(model, prefix).named_children() if name == "pooler"]
    return [*poolers, *heads]


def auto_class(architecture: Architecture) -> Any:
    """The class of transformers that gives models of this kind."""
    return getattr(transformers, architecture.auto_class)


def open_pretrained(config: ModelConfig, folder: str, architecture: Architecture, /, **options: Any) -> Any:
    """What transformers' `from_pretrained` gives, also where its classes call a base by two names.

    Weights are saved again under the names of the class that they were loaded into.
    """
    renamed = rename_base(config, folder, architecture)
    found = auto_class(architecture).from_pretrained(folder, **options, **({"key_mapping": renamed} if renamed else {}))
    if renamed:
        (found[0] if isinstance(found, tuple) else found)._weight_conversions = None  # else saving renames them back
    return found


def rename_base(config: ModelConfig, folder: str, architecture: Architecture) -> dict[str, str]:
    """The `key_mapping` of `from_pretrained` that a new head needs over a folder of another class; mostly none.

    Decoders of transformers call their base `model`, and `transformer` in their form for questions (5.23): without
    this that form begins with random weights over a folder of a language model.
    """
    if not architecture.new_head:
        return {}
    own = load_config(config, folder).architectures or ("",)
    before = getattr(getattr(transformers, own[0], None), "base_model_prefix", "")
    after = _model_class(config, folder, architecture).base_model_prefix
    if not before or before == after or own[0].endswith("Model"):
        return {}
    return {rf"^{before}\.": f"{after}."}


def _read(config: ModelConfig, folder: str, architecture: Architecture, options: dict[str, Any]) -> PreTrainedModel:
    try:
        model, report = open_pretrained(
            config,
            folder,
            architecture,
            revision=config.revision,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # the report names them
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError.of(
            "model.name_or_path", f"{folder}: {_first_line(error)}", "see that its safetensors are whole and its own"
        ) from error
    head = tuple(f"{name}." for name in find_task_head(model)) if architecture.new_head else ()
    problems = []
    for kind in ("missing_keys", "mismatched_keys"):
        found = (entry if isinstance(entry, str) else entry[0] for entry in report.get(kind) or ())
        if names := sorted(name for name in found if not (head and name.startswith(head))):
            rule = f"{kind.replace('_', ' ')} would be made up at random: {', '.join(names[:5])} ({len(names)} in all)"
            problems.append(Problem(f"model.name_or_path={folder}", rule, "use weights of the config.json beside them"))
    if problems:
        raise RequestError(*problems)
    assert isinstance(model, PreTrainedModel)
    return model


def _settle_generation(model: PreTrainedModel, config: ModelConfig, folder: str) -> None:
    """Have a model that is built from its configuration generate as one that is read from the folder.

    Else ranks that are sent their weights would score other texts than rank 0, such as BART's without its first token.
    """
    if model.can_generate():
        with contextlib.suppress(OSError):  # many folders say nothing of it
            model.generation_config = GenerationConfig.from_pretrained(folder, revision=config.revision)


def _model_class(config: ModelConfig, folder: str, architecture: Architecture) -> type[PreTrainedModel]:
    settings = load_config(config, folder)
    auto = auto_class(architecture)
    with torch.device("meta"), no_init_weights():  # remote code has no mapping to look up
        if type(settings) in auto._model_mapping:
            found: type[PreTrainedModel] = auto._model_mapping[type(settings)]
            return found
        try:
            return type(auto.from_config(settings, trust_remote_code=config.trust_remote_code))
        except ValueError as error:
            kind = architecture.auto_class.removeprefix("AutoModelFor")
            raise RequestError.of(
                "model.name_or_path",
                f"{Path(folder).name}: {_first_line(error)}",
                f"name a model that has a {kind} form",
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
