"""Loading of a model as its task requires: with weights on one rank, and the same modules without on the others."""

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
from .attention.choice import AttentionChoice, choose_attention
from .noise import set_dropout
from .quantization.stored import forget_stored, read_dequantized, settle_dequantized
from .quantize import quantize_parts
from .vocabulary import grow, grow_settings


def load_config(config: ModelConfig, folder: str) -> PreTrainedConfig:
    """Return the configuration of the model in `folder`.

    Raises:
        RequestError: The folder has no configuration that transformers can read.
    """
    try:
        return AutoConfig.from_pretrained(folder, revision=config.revision, trust_remote_code=config.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise RequestError.of(
            "model.name_or_path", f"{folder}: {_first_line(error)}", "set it to a folder or Hub id of a model"
        ) from error


def load_settings(config: ModelConfig, folder: str, architecture: Architecture) -> PreTrainedConfig:
    """Return the configuration with the overrides that the task requires."""
    settings = load_config(config, folder)
    for key, value in architecture.overrides.items():
        setattr(settings, key, value)
    return settings


def attention_of(
    config: ModelConfig, folder: str, device: torch.device, architecture: Architecture, requested: str | None = None
) -> AttentionChoice:
    """Choose the attention implementation and the layout of micro-batches for this model on this device.

    Args:
        config: The `model` group.
        folder: The model's files.
        device: Where the model computes.
        architecture: What the task needs of the model.
        requested: Instead of `model.attn_implementation`, for a model that is built where the run does not compute.
    """
    settings = load_settings(config, folder, architecture)
    if config.dropout is not None:
        set_dropout(settings, config.dropout)
    return choose_attention(
        requested or config.attn_implementation,
        _model_class(config, folder, architecture),
        settings,
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
        weights: If False, parameters are uninitialized memory, which the operating system allocates only when it is
            written. It is meant for ranks that receive their weights later; modules and buffers are the same.

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
        model = auto_class(architecture).from_config(settings, **options)  # draws weights from torch's generator
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
    """Return the names of the modules outside a model's base, that is, of the task's head, including a pooler.

    The pooler of a BERT was trained for its pre-training task, and is missing in many folders.

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
    """Return the auto class of transformers for this architecture."""
    return getattr(transformers, architecture.auto_class)


def open_pretrained(
    config: ModelConfig, folder: str, architecture: Architecture, settings: PreTrainedConfig, /, **options: Any
) -> Any:
    """Call `from_pretrained`, also if the classes of an architecture use different names for the base model.

    Weights are saved under the names of the class into which they were loaded. Weights that are quantized in the folder
    are dequantized.

    Raises:
        RequestError: The weights are quantized in a format that cannot be dequantized.
        MachineError: A package that is needed to read them is not installed.
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
        model._weight_conversions = None  # otherwise, saving would rename the weights back
    return found


def _build_empty(settings: PreTrainedConfig, architecture: Architecture, options: dict[str, Any]) -> Any:
    """Build the modules that `from_pretrained` builds for unquantized weights, without initializing them."""
    with no_init_weights():
        model = auto_class(architecture).from_config(settings, **options)
    _keep_in_float32(model)
    model.tie_weights()
    return model


def _keep_in_float32(model: Any) -> None:
    """Convert modules that the class keeps in float32, as `from_pretrained` does but `from_config` does not (5.23).

    Otherwise, ranks without weights would have them in bfloat16: for example, the correction bias of DeepSeek-V3's
    routers, and the routers of ERNIE 4.5.
    """
    wanted = [re.compile(name.replace("*", ".*")) for name in model._keep_in_fp32_modules_strict or ()]
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and any(pattern.search(name) for pattern in wanted):
            tensor.data = tensor.data.float()


def rename_base(config: ModelConfig, folder: str, architecture: Architecture) -> dict[str, str]:
    """Return the `key_mapping` of `from_pretrained` for a new head on a folder of another class; usually empty.

    Decoders in transformers name their base `model`, but `transformer` in their question answering class (5.23).
    Without the mapping, that class would start with random weights when it is loaded from a language model.
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
            ignore_mismatched_sizes=True,  # mismatches are reported in the error below
            **options,
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError.of(
            "model.name_or_path", f"{folder}: {_first_line(error)}", "check that its safetensors files are complete"
        ) from error
    head = tuple(f"{name}." for name in find_task_head(model)) if architecture.new_head else ()
    problems = []
    for kind in ("missing_keys", "mismatched_keys"):
        found = (entry if isinstance(entry, str) else entry[0] for entry in report.get(kind) or ())
        if names := sorted(name for name in found if not (head and name.startswith(head))):
            rule = f"{kind.replace('_', ' ')} would be made up at random: {', '.join(names[:5])} ({len(names)} in all)"
            problems.append(Problem(f"model.name_or_path={folder}", rule, "use weights that match its config.json"))
    if problems:
        raise RequestError(*problems)
    assert isinstance(model, PreTrainedModel)
    return model


def _settle_generation(model: PreTrainedModel, config: ModelConfig, folder: str) -> None:
    """Give a model that is built from its configuration the generation settings of the folder.

    Otherwise, ranks without weights would generate other texts than rank 0, such as BART's without its first token.
    """
    if model.can_generate():
        with contextlib.suppress(OSError):  # many folders have no generation_config.json
            model.generation_config = GenerationConfig.from_pretrained(folder, revision=config.revision)


def _model_class(config: ModelConfig, folder: str, architecture: Architecture) -> type[PreTrainedModel]:
    settings = load_config(config, folder)
    auto = auto_class(architecture)
    with torch.device("meta"), no_init_weights():  # built because remote code has no class mapping
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
                f"use a model that has a {kind} class",
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
