"""The `optim` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Share, Strict


class OptimConfig(Strict):
    """AdamW (Loshchilov and Hutter 2019) and the learning rate schedule."""

    name: Literal["adamw"] = "adamw"
    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    weight_decay: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Not applied to one-dimensional parameters and (IA)^3 factors."
    )
    betas: tuple[Share, Share] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-8
    lr_scheduler_type: Literal["linear", "cosine", "constant"] = "cosine"
    warmup_ratio: Share = Field(0.0, description="Fraction of the steps in which the learning rate rises from 0.")
    max_grad_norm: Annotated[float, Field(ge=0)] = Field(
        1.0, description="Maximum global norm of the gradients; 0 disables clipping."
    )
