"""The dtype of a run with `model.dtype=auto`: bfloat16 on GPUs that compute in it, otherwise that of the checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ..config.plan import CHECKPOINTS, read_plan
from ..config.run import RunConfig
from ..errors import DistFtError, RequestError
from ..pretrained.folder import read_json
from ..pretrained.source import find_model
from .batch import AUTO

DTYPE = "model.dtype"


def settle_dtype(config: RunConfig, origins: Mapping[str, str], *, bfloat16: bool) -> tuple[RunConfig, dict[str, str]]:
    """Replace `model.dtype=auto`; a run that is resumed keeps its dtype, also on other devices.

    Args:
        config: Composed configuration.
        origins: Origins of the keys that the user set.
        bfloat16: Whether the workers have GPUs that compute in bfloat16.

    Returns:
        The configuration, and the origins with that of the dtype, which begins with `AUTO` and gives the reason.
    """
    if config.model.dtype != "auto":
        return config, dict(origins)
    found: tuple[str, str] | None = _resumed(config)
    if found is None:
        found = ("bfloat16", "the GPUs of the workers compute in it") if bfloat16 else _stored(config)
    dtype, reason = found
    model = config.model.model_copy(update={"dtype": dtype})
    return config.model_copy(update={"model": model}), {**origins, DTYPE: f"{AUTO}: {reason}"}


def _resumed(config: RunConfig) -> tuple[str, str] | None:
    folder = Path(config.output_dir)
    if not any(folder.glob(f"{CHECKPOINTS}/step-*")):
        return None
    try:
        return read_plan(folder).config.model.dtype, f"that of the run in {folder}"
    except RequestError:  # reported by the checks of the folder
        return None


def _stored(config: RunConfig) -> tuple[str, str]:
    """Return the dtype of the checkpoint; float32 for float16, in which no engine trains, and where it is not known."""
    if config.model.from_scratch:
        return "float32", "the weights are initialized, and no GPU computes in bfloat16"
    stored = _stored_name(config)
    if stored in ("bfloat16", "float32"):
        return stored, "that of the checkpoint"
    return "float32", f"the checkpoint has {stored}" if stored else "the checkpoint names no dtype"


def _stored_name(config: RunConfig) -> str | None:
    """Return the dtype that the model's config.json names; None if there is no such file or it names none."""
    try:
        source = find_model(config.model.name_or_path)
    except DistFtError:  # reported when the model is read
        return None
    if source.kind == "gguf":
        return None
    file = source.path / "config.json" if source.path else _hub_settings(source.name, config.model.revision)
    settings = read_json(file)[0] if file else {}
    for part in (settings, settings.get("text_config") or {}):
        found = part.get("dtype") or part.get("torch_dtype")
        if found:
            return str(found)
    return None


def _hub_settings(name: str, revision: str | None) -> Path | None:
    """Return the path of a Hub model's config.json, downloaded if necessary; None if it cannot be downloaded."""
    from huggingface_hub import hf_hub_download

    try:
        return Path(hf_hub_download(name, "config.json", revision=revision))
    except (OSError, ValueError, RuntimeError):  # base classes of its errors; reported when the model is downloaded
        return None
