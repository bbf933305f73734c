"""Loading a model in the form that its task needs: weights on one rank, the same modules without on the others."""

from __future__ import annotations

import contextlib
import re
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..config.model import ModelConfig
from ..errors import MachineError, Problem, RequestError
from ..state import CAUSAL_LM, Anatomy, Architecture
from .anatomy import find_anatomy
from .attention import AttentionChoice, choose_attention
from .noise import set_dropout
from .quantization.stored import forget_stored, read_dequantized, settle_dequantized
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


def load_settings(config: ModelConfig, folder: str, architecture: Architecture) -> PreTrainedConfig:
    """Return the configuration with what the task needs of it."""
    settings = load_config(config, folder)
    for key, value in architecture.overrides.items():
        setattr(settings, key, value)
    return settings


def attention_of(config: ModelConfig, folder: str, device: torch.device, architecture: Architecture) -> AttentionChoice:
    """Choose the attention implementation and the layout of micro-batches for this model on this device."""
    return choose_attention(
        config.attn_implementation,
        _model_class(config, folder, architecture),
        load_settings(config, folder, architecture),
        device,
        getattr(torch, config.dtype),
        causal=architecture.auto_class == CAUSAL_LM.auto_class,
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
    settings = load_settings(config, folder, architecture)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    if not weights or config.from_scratch:
        forget_stored(settings)
    options: dict[str, Any] = {
        "attn_implementation": attention.implementation,
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
    }
    if weights and config.from_scratch:
        grow_settings(settings, architecture)
        model = auto_class(architecture).from_config(settings, **options)  # which draws them from torch's generator
        _keep_in_float32(model)
    elif weights:
        model = _read(config, folder, architecture, settings, options)
        grow(model, architecture)
    else:
        grow_settings(settings, architecture)
        model = _build_empty(settings, architecture, options)
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


def open_pretrained(
    config: ModelConfig, folder: str, architecture: Architecture, settings: PreTrainedConfig, /, **options: Any
) -> Any:
    """What transformers' `from_pretrained` gives, also where its classes call a base by two names.

    Weights are saved again under the names of the class that they were loaded into. Those that are quantized in the
    folder are dequantized.

    Raises:
        RequestError: The weights are quantized in a format that cannot be dequantized.
        MachineError: A package that reads them is not installed.
    """
    renamed, stored = rename_base(config, folder, architecture), read_dequantized(settings)
    mapping = {"key_mapping": renamed} if renamed else {}
    try:
        found = auto_class(architecture).from_pretrained(folder, config=settings, **options, **mapping, **stored)
    except ImportError as error:
        way_out = "install it, or use the 16-bit model that it was made from"
        raise MachineError.of("model.name_or_path", f"{folder}: {_first_line(error)}", way_out) from error
    model = found[0] if isinstance(found, tuple) else found
    if stored:
        with torch.device("meta"):
            plain = _build_empty(settings, architecture, {"dtype": options["dtype"]})
        settle_dequantized(model, {name: tensor.dtype for name, tensor in plain.state_dict().items()})
    if renamed:
        model._weight_conversions = None  # else saving renames them back
    return found


def _build_empty(settings: PreTrainedConfig, architecture: Architecture, options: dict[str, Any]) -> Any:
    """The modules that `from_pretrained` gives for plain weights of this configuration, uninitialized."""
    with no_init_weights():
        model = auto_class(architecture).from_config(settings, **options)
    _keep_in_float32(model)
    model.tie_weights()
    return model


def _keep_in_float32(model: Any) -> None:
    """Give what the class wants in float32 that dtype, as `from_pretrained` does and `from_config` does not (5.23).

    Such as the correction bias of DeepSeek-V3's routers and the whole routers of ERNIE 4.5, which ranks without weights
    would have in bfloat16.
    """
    wanted = [re.compile(name.replace("*", ".*")) for name in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in wanted):
            tensor.data = tensor.data.float()


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


def _read(
    config: ModelConfig, folder: str, architecture: Architecture, settings: PreTrainedConfig, options: dict[str, Any]
) -> PreTrainedModel:
    try:
        model, report = open_pretrained(
            config,
            folder,
            architecture,
            settings,
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
