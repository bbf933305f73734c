"""The typed configuration of a run: an unknown key is an error, and each choice of a group has its own keys.

Keys have the names of Hugging Face and TRL wherever the meaning is the same. The groups are the folders of `conf/`.
The modules of `config` define the keys; `checks` reports every problem of a composed configuration.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any

from pydantic import Field, model_validator

from .data import DataConfig
from .engine import EngineConfig
from .launch import LaunchConfig
from .method import MethodConfig
from .model import ModelConfig
from .moe import MoeConfig
from .optim import OptimConfig
from .privacy import PrivacyConfig
from .strict import Strict, Text
from .task import TaskConfig
from .track import TrackConfig
from .train import TrainConfig

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
        "chunked_loss",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_minutes",
        "save_total_limit",
        "on_nonfinite",
        "async_save",
        "save_final_state",
        "early_stopping_patience",
        "resume",
        "accept_changes",
        "stop_before_s",
        "timeout_s",
        "restarts",
    },
}
SECRETS = {"privacy": {"noise_seed"}}  # in no hash that others may read


class RunConfig(Strict):
    """Complete configuration of a run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
    output_dir: Text
    model: ModelConfig
    task: TaskConfig
    data: DataConfig
    method: MethodConfig
    moe: MoeConfig = MoeConfig()  # type: ignore[call-arg]
    privacy: PrivacyConfig = PrivacyConfig()  # type: ignore[call-arg]
    engine: EngineConfig
    optim: OptimConfig
    train: TrainConfig
    track: TrackConfig
    launch: LaunchConfig

    @model_validator(mode="before")
    @classmethod
    def settle_quantization(cls, values: Any) -> Any:
        """Set `model.quantization` from the method if it is not given, so that the plan contains the value."""
        model, method = (values.get(key) for key in ("model", "method")) if isinstance(values, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(method, dict) or model.get("quantization") is not None:
            return values
        return {**values, "model": {**model, "quantization": "nf4" if method.get("name") == "qlora" else "none"}}


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
