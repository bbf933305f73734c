"""Loading a causal language model: weights on one rank, the same modules without weights on the others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.initialization import no_init_weights

from ..errors import Problem, RequestError
from ..schema import ModelConfig
from .attention import AttentionChoice, choose_attention
from .quantize import quantize


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


def attention_of(config: ModelConfig, folder: str, device: torch.device) -> AttentionChoice:
    """What `model.attn_implementation` becomes for this model on this device."""
    return choose_attention(
        config.attn_implementation, _model_class(config, folder), device, getattr(torch, config.dtype)
    )


def load_model(config: ModelConfig, folder: str, attention: AttentionChoice, *, weights: bool) -> PreTrainedModel:
    """The model on the CPU in `config.dtype`.

    Linear layers are quantised one by one as `config.quantization` says. With `weights` false, modules and buffers are
    the same and parameters are uninitialised memory, which the operating system does not even allocate until it is
    written: ranks that are sent their weights cost nothing here.

    Raises:
        RequestError: weights are missing, have other shapes, or belong to another architecture.
    """
    architecture = load_config(config, folder)
    options: dict[str, Any] = {
        "attn_implementation": attention.implementation,
        "trust_remote_code": config.trust_remote_code,
        "dtype": getattr(torch, config.dtype),
    }
    if weights:
        model = _read(config, folder, options)
    else:
        with no_init_weights():
            model = AutoModelForCausalLM.from_config(architecture, **options)
        model.tie_weights()
    quantize(model, config.quantization or "none", getattr(torch, config.dtype), weights=weights)
    model.config.use_cache = False
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _read(config: ModelConfig, folder: str, options: dict[str, Any]) -> PreTrainedModel:
    try:
        model, report = AutoModelForCausalLM.from_pretrained(
            folder, revision=config.revision, use_safetensors=True, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise RequestError.of(
            "model.name_or_path", f"{folder}: {_first_line(error)}", "see that its safetensors are whole and its own"
        ) from error
    problems = []
    for kind in ("missing_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(kind) or ()):
            rule = f"{kind.replace('_', ' ')} would be made up at random: {', '.join(names[:5])} ({len(names)} in all)"
            problems.append(Problem(f"model.name_or_path={folder}", rule, "use weights of the config.json beside them"))
    if problems:
        raise RequestError(*problems)
    return model


def _model_class(config: ModelConfig, folder: str) -> type[PreTrainedModel]:
    architecture = load_config(config, folder)
    with torch.device("meta"), no_init_weights():  # remote code has no mapping to look up
        if type(architecture) in AutoModelForCausalLM._model_mapping:
            found: type[PreTrainedModel] = AutoModelForCausalLM._model_mapping[type(architecture)]
            return found
        try:
            return type(AutoModelForCausalLM.from_config(architecture, trust_remote_code=config.trust_remote_code))
        except ValueError as error:
            raise RequestError.of(
                "model.name_or_path",
                f"{Path(folder).name}: {_first_line(error)}",
                "name a causal language model",
            ) from error


def _first_line(error: BaseException) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
