"""The configuration of a run, typed and strict: an unknown key is an error, each choice of a group has its own keys.

Names are those of Hugging Face and TRL wherever the meaning is the same. The groups are the folders of `conf/`;
`checks.py` gathers every problem of a composed configuration, this file says what a key is.
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
from .strict import Strict
from .task import TaskConfig
from .track import TrackConfig
from .train import TrainConfig


class RunConfig(Strict):
    """All of a run."""

    run_name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=120)]
    output_dir: str
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
        """What is not given becomes what the method means, so that a plan says it."""
        model, method = (values.get(key) for key in ("model", "method")) if isinstance(values, dict) else (None, None)
        if not isinstance(model, dict) or not isinstance(method, dict) or model.get("quantization") is not None:
            return values
        return {**values, "model": {**model, "quantization": "nf4" if method.get("name") == "qlora" else "none"}}


def json_schema() -> dict[str, Any]:
    """JSON Schema of a composed configuration, for editors."""
    return RunConfig.model_json_schema()
