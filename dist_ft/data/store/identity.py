"""Cache folders of prepared splits, named by the hash of all their inputs.

Does not import torch, because the launcher calls `is_prepared` before it starts any process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ...config.run import RunConfig
from ...errors import MachineError, RequestError
from ...pretrained.source import find_model, find_snapshot, model_folder
from ...storage.cache import CODE_VERSION, cache_root, hash_of, remembering_digest
from ...storage.files import digest_file
from ...storage.published import is_whole
from ..read.augment import augment_identity
from ..read.chosen import identity, source_identity
from ..read.sets import ALONE, SPLITS, SplitName, sets_of
from ..read.sources import fingerprint
from ..render.template_file import read_template

RENDERING_VERSION = 3  # of conversations: increase it with every change of their tokens and labels
_LATER_KEYS = {
    "chat_template_kwargs": {},
    "reasoning": "require",
    "train_on": "assistant",
    "train_on_eos": "turn",
    "one_row_per_turn": False,
}
TOKENIZER_FILES = ("*token*.json", "vocab.*", "merges.txt", "*.model", "*.jinja", "*.tiktoken", "chat_template.json")


def split_folder(config: RunConfig, split: SplitName, part: str = ALONE) -> Path:
    """Return the cache folder of a split's tokenized rows; its name is a hash of everything that determines them.

    Args:
        config: Configuration of the run.
        split: Name of the split.
        part: Name of the dataset in a mixture.

    Raises:
        RequestError: The data or the tokenizer does not exist.
    """
    alone = sets_of(config, split)[part]
    data, root = alone.data, cache_root(config)
    task = config.task.model_dump(mode="json")
    for name, default in _LATER_KEYS.items():
        if task.get(name) == default:  # not in the names of splits that earlier versions prepared
            del task[name]
    renders = "chat_template" in task and not alone.data.only_tokens
    content = {
        "version": CODE_VERSION,
        **({"rendering": RENDERING_VERSION} if renders else {}),
        "rows": _fingerprint(alone, split, root),
        "reading": source_identity(alone),
        **({"augment": augment} if (augment := augment_identity(alone, split)) else {}),
        **({"chosen": chosen} if (chosen := identity(alone, split)) else {}),
        "task": {**task, "chat_template": read_template(config.task)},
        # A training split of the same rows differs, because it determines the labels and keeps no rows for metrics.
        "labels": [split == "train", _labels_identity(config, split)],
        "special_tokens_in_text": data.special_tokens_in_text,
        "tokenizer": _tokenizer_identity(alone),
        **({"add_tokens": config.model.add_tokens} if config.model.add_tokens else {}),
        "packing": ("train", data.shuffle) if config.task.packs and split == "train" else "evaluation",
    }
    return root / "data" / hash_of(content)


def _fingerprint(alone: RunConfig, split: SplitName, root: Path) -> str:
    data = alone.data
    digest = remembering_digest(root)
    return fingerprint(data.sources(split) or [], data.revision, digest, data.source_split(split))


def is_prepared(config: RunConfig) -> bool:
    """Return whether everything is prepared already; also False if `prepare` would raise an error."""
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


def _models(config: RunConfig) -> list[tuple[str, str]]:
    names = [(config.model.name_or_path, "model.name_or_path")]
    return [*names, (config.model.tokenizer, "model.tokenizer")] if config.model.tokenizer else names


def _tokenizer_identity(config: RunConfig) -> Any:
    if config.data.format == "tokens":
        return None  # tokenized rows are used unchanged
    name, key = _models(config)[-1]
    source = find_model(name, key)
    if source.path is None:
        return ["hub", name, config.model.revision or "main"]
    if source.kind == "gguf":
        return ["gguf", remembering_digest(cache_root(config))(source.path)]
    folder = source.path
    files = sorted({file for pattern in TOKENIZER_FILES for file in folder.glob(pattern) if file.is_file()})
    return ["files", {file.name: digest_file(file) for file in files}]


def _labels_identity(config: RunConfig, split: SplitName) -> Any:
    """Return the identity of the data that determines the label ids, or None if it needs no separate identity.

    Label ids come from the training split unless `task.labels` is set. In a mixture they come from the training rows of
    all datasets, which therefore affect each dataset.
    """
    if not hasattr(config.task, "labels") or config.task.labels is not None:
        return None
    if config.data.mixture is None:
        return None if split == "train" else split_folder(config, "train").name
    return [
        [
            _fingerprint(part, "train", cache_root(config)),
            source_identity(part),
            *([chosen] if (chosen := identity(part, "train")) else []),
        ]
        for part in sets_of(config).values()
    ]
