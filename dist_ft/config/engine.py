"""The `engine` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class DdpConfig(Strict):
    """Every rank holds everything; gradients are summed."""

    name: Literal["ddp"]


class FsdpConfig(Strict):
    """PyTorch FSDP2: parameters, gradients and optimizer state sharded block by block."""

    name: Literal["fsdp"]
    offload: Literal["none", "params"] = Field("none", description="`params`: shards and the update live on the CPU.")
    reshard_after_forward: bool = Field(True, description="Free a block's weights between forward and backward.")


class Zero12Config(Strict):
    """DeepSpeed ZeRO-1 (optimizer state sharded) and ZeRO-2 (gradients too)."""

    name: Literal["zero1", "zero2"]
    offload: Literal["none", "optimizer"] = "none"


class Zero3Config(Strict):
    """DeepSpeed ZeRO-3: parameters sharded too."""

    name: Literal["zero3"]
    offload: Literal["none", "optimizer", "params"] = Field("none", description="`params` offloads both.")


EngineConfig = Annotated[DdpConfig | FsdpConfig | Zero12Config | Zero3Config, Field(discriminator="name")]
