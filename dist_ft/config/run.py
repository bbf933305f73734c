"""The typed configuration of a run: an unknown key is an error, and each choice of a group has its own keys.

Keys have the names of Hugging Face and TRL wherever the meaning is the same. The groups are the folders of `conf/`.
The modules of `config` define the keys; `checks` reports every problem of a composed configuration.
"""

from __future__ import annotations

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


def json_schema() -> dict[str, Any]:
    """Return the JSON Schema of a composed configuration, for use in editors."""
    return RunConfig.model_json_schema()
