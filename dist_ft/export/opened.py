"""Loading of an export and its base model with transformers and PEFT, as users of the export do."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from ..config.model import ModelConfig
from ..config.plan import CHECKPOINTS, EXPORT, Plan
from ..errors import RequestError, TrainingError
from ..method.adapter import is_bottleneck, load_adapter
from ..model.load import auto_class, load_settings, open_pretrained
from ..model.quantize import quantize
from ..model.vocabulary import grow
from ..pretrained.source import is_hub_id
from ..state import CAUSAL_LM, Architecture

ADAPTER_CONFIG = "adapter_config.json"
AGAIN = "export again from a checkpoint: dist-ft export run=… checkpoint=latest"


def find_export(run_dir: Path) -> Path:
    """Return the folder of the run's export.

    Raises:
        RequestError: If the run has no export yet.
    """
    folder = run_dir / EXPORT
    if not (folder / "config.json").exists() and not (folder / ADAPTER_CONFIG).exists():
        way_out = "let the run finish, or export a checkpoint: dist-ft export run=… checkpoint=latest"
        raise RequestError.of(str(folder), "the run has no exported model yet", way_out)
    return folder


def find_trained_run(plan: Plan, run_file: str) -> Path:
    """Return the folder of a trained run: the folder of its run file if it holds a model, else the planned folder."""
    beside = Path(run_file)
    beside = beside if beside.is_dir() else beside.parent
    return beside if (beside / EXPORT).exists() or (beside / CHECKPOINTS).exists() else plan.run_dir


def is_adapter(folder: Path) -> bool:
    """Return whether the folder contains an adapter, which needs its base model."""
    return (folder / ADAPTER_CONFIG).exists()


def name_base(config: ModelConfig, model_dir: str) -> str:
    """Return the name by which users can load the base model: its Hub id or its absolute path."""
    return config.name_or_path if is_hub_id(config.name_or_path) else str(Path(model_dir).resolve())


def open_base(
    config: ModelConfig, model_dir: str, architecture: Architecture = CAUSAL_LM, **options: Any
) -> PreTrainedModel:
    """Load the base model with transformers, quantized as in training; a new head is randomly initialized.

    Raises:
        RequestError: If the run trained a model from scratch.
    """
    if config.from_scratch:
        rule = "the run trained a model from scratch, so there is no base model"
        raise RequestError.of("model.from_scratch", rule, "set model=export and remove baseline=true")
    options.setdefault("dtype", getattr(torch, config.dtype))
    model: PreTrainedModel = open_pretrained(
        config,
        model_dir,
        architecture,
        load_settings(config, model_dir, architecture),
        use_safetensors=True,
        trust_remote_code=config.trust_remote_code,
        **options,
    )
    grow(model, architecture)
    quantize(model, config.quantization or "none", getattr(torch, config.dtype), weights=True)
    return model


def open_export(
    folder: Path, config: ModelConfig, model_dir: str, architecture: Architecture = CAUSAL_LM, **options: Any
) -> nn.Module:
    """Load the trained model from the export in `folder`; an adapter is loaded on the base model in `model_dir`.

    Raises:
        TrainingError: If the folder cannot be loaded or its weights do not match the model.
    """
    if is_adapter(folder):
        base = open_base(config, model_dir, architecture, **options)
        if is_bottleneck(folder):
            return load_adapter(base, folder)
        import peft  # takes seconds

        return peft.PeftModel.from_pretrained(base, str(folder), use_safetensors=True)
    try:
        model, report = auto_class(architecture).from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # mismatches are reported in the error below
            trust_remote_code=config.trust_remote_code,
            **{"dtype": "auto", **options},
        )
    except (OSError, ValueError, RuntimeError) as error:
        raise TrainingError.of(str(folder), f"cannot be loaded: {error}", AGAIN) from error
    for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"):
        if names := sorted(str(name) for name in report.get(kind) or ()):
            rule = f"{kind.replace('_', ' ')} on loading: {', '.join(names[:5])} ({len(names)} in total)"
            raise TrainingError.of(str(folder), rule, AGAIN)
    assert isinstance(model, nn.Module)
    return model


def set_adapter_base(folder: Path, base: str, revision: str | None) -> None:
    """Write the base model's name and revision to the adapter's configuration, so that users can load it."""
    path = folder / ADAPTER_CONFIG
    settings = json.loads(path.read_text(encoding="utf-8"))
    settings |= {"base_model_name_or_path": base, "revision": revision}
    path.write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
