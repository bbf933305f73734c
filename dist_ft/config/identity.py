"""What makes two starts the same run: the settings that may not change when a run is resumed."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from .run import RunConfig

SECTIONS = ("model", "task", "data", "method", "moe", "privacy", "optim", "train")

# Keys that may change when a run is resumed: execution, monitoring and length, but not what is trained on which data.
MAY_CHANGE = {
    "model": {"attn_implementation", "gradient_checkpointing", "trust_remote_code"},
    "data": {"cache_dir", "validation", "test"},
    "train": {
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "early_stopping_patience",
        "resume",
        "stop_before_s",
        "timeout_s",
    },
}
SECRETS = {"privacy": {"noise_seed"}}  # in no hash that others may read


def settings_of(config: RunConfig) -> str:
    """Return a hash of the settings that may not change within a run, of those that differ from their defaults.

    A key that a later version adds therefore changes nothing while it has its default.
    """
    kept = {}
    for section in SECTIONS:
        given = without_sets_keys(getattr(config, section).model_dump(mode="json", exclude_defaults=True))
        left_out = MAY_CHANGE.get(section, set()) | SECRETS.get(section, set())
        kept[section] = {key: value for key, value in given.items() if key not in left_out}
    return hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest()[:16]


def without_sets_keys(section: dict[str, Any]) -> dict[str, Any]:
    """Return a section's values without the keys of mixture sets that may change when a run is resumed."""
    if not section.get("mixture"):
        return section
    sets = {
        name: {key: value for key, value in part.items() if key not in MAY_CHANGE["data"]}
        for name, part in section["mixture"].items()
    }
    return {**section, "mixture": sets}
