"""Download or convert a pretrained model once, into a folder that every worker reads."""

from __future__ import annotations

from pathlib import Path

from ..config.run import RunConfig
from ..errors import RequestError
from ..state import Say
from ..storage.cache import cache_root
from ..storage.published import is_whole, publish, require_room
from .source import find_model, find_snapshot, model_folder

_HUB_FILES = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken")
_HUB_CODE = "*.py"


def prepare_model(config: RunConfig, say: Say = lambda line: None) -> tuple[str, str]:
    """Return the folders of the model and of its tokenizer, after download or conversion if necessary.

    Raises:
        RequestError: If the model does not exist or cannot be downloaded from the Hub.
        MachineError: If a package is not installed or the cache is not writable.
    """
    model_dir = _local_folder(config, config.model.name_or_path, "model.name_or_path", say)
    if config.model.tokenizer is None:
        return model_dir, model_dir
    return model_dir, _local_folder(config, config.model.tokenizer, "model.tokenizer", say)


def _local_folder(config: RunConfig, name: str, key: str, say: Say) -> str:
    source = find_model(name, key)
    if source.kind == "folder":
        return str(source.path)
    if source.kind == "hub":
        return _download(config, name, key)
    gguf = source.path
    assert gguf is not None
    folder = model_folder(config, source)
    if not is_whole(folder):
        from . import gguf as gguf_model

        def build(out: Path) -> None:
            require_room(out, gguf.stat().st_size * gguf_model.FLOAT32_OF_GGUF)
            say(f"{key}: converting {gguf.name} to safetensors (only once)")
            gguf_model.convert(gguf, out)

        publish(folder, build)
    return str(folder)


def _download(config: RunConfig, name: str, key: str) -> str:
    """Return the folder of a Hub model, downloaded by one process of the node while the others wait."""
    from filelock import FileLock
    from huggingface_hub import snapshot_download

    revision = config.model.revision if key == "model.name_or_path" else None
    root = cache_root(config)
    root.mkdir(parents=True, exist_ok=True)
    patterns = [*_HUB_FILES, _HUB_CODE] if config.model.trust_remote_code else list(_HUB_FILES)
    try:
        with FileLock(root / "download.lock"):
            return snapshot_download(name, revision=revision, allow_patterns=patterns)
    except (OSError, ValueError, RuntimeError) as error:  # base classes of the errors of huggingface_hub
        if (known := find_snapshot(name, revision)) is not None:
            return known
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "check the ID, the network and HF_TOKEN, or set it to a local folder"
        raise RequestError.of(key, f"{name} cannot be downloaded from the Hub ({reason})", way_out) from error
