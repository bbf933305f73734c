"""The `moe` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class MoeConfig(Strict):
    """Mixtures of experts; setting one of these for a model without experts is an error."""

    router: Literal["frozen", "train", "adapt"] | None = Field(
        None, description="`train`: whole; `adapt`: by LoRA. If not given: trained by method=full, else frozen."
    )
    aux_loss_coef: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Balance loss over the global batch. By default the model's own where routers learn, else 0.",
    )
    aux_loss_per_layer: bool = Field(False, description="Balance each layer; false: their sum, as transformers.")
    z_loss_coef: Annotated[float, Field(ge=0)] = Field(0.0, description="Mean squared logsumexp of router logits.")
