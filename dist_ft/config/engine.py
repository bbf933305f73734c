"""The `engine` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class DdpConfig(Strict):
    """PyTorch DDP: every rank holds a full replica of the model, and gradients are all-reduced."""

    name: Literal["ddp"]


class FsdpConfig(Strict):
    """PyTorch FSDP2: parameters, gradients and optimizer state are sharded block by block."""

    name: Literal["fsdp"]
    offload: Literal["none", "params"] = Field(
        "none", description="`params`: keep shards and run the optimizer on the CPU."
    )
    reshard_after_forward: bool = Field(True, description="Free a block's full weights between forward and backward.")
    gradient_reduction: Literal["micro_batch", "step"] = Field(
        "micro_batch",
        description="`step`: communicate gradients once per step; each rank holds whole gradients until then.",
    )


class Zero12Config(Strict):
    """DeepSpeed ZeRO-1 (sharded optimizer state) and ZeRO-2 (sharded gradients as well)."""

    name: Literal["zero1", "zero2"]
    offload: Literal["none", "optimizer"] = "none"


class Zero3Config(Strict):
    """DeepSpeed ZeRO-3: parameters are sharded as well."""

    name: Literal["zero3"]
    offload: Literal["none", "optimizer", "params"] = Field(
        "none", description="`params` offloads optimizer state and parameters."
    )


EngineConfig = Annotated[DdpConfig | FsdpConfig | Zero12Config | Zero3Config, Field(discriminator="name")]
