"""The `moe` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class MoeConfig(Strict):
    """Mixture-of-experts options; setting one of them for a model without experts is an error."""

    router: Literal["frozen", "train", "adapt"] | None = Field(
        None,
        description="`train`: train the routers fully; `adapt`: train them with LoRA. Defaults to train for"
        " method=full and to frozen otherwise.",
    )
    aux_loss_coef: Annotated[float, Field(ge=0)] | None = Field(
        None,
        description="Coefficient of the load-balancing loss over the global batch. Defaults to the model's value if"
        " routers are trained, else 0.",
    )
    aux_loss_per_layer: bool = Field(
        False, description="Balance each layer by itself; false balances the sum over layers, as transformers does."
    )
    z_loss_coef: Annotated[float, Field(ge=0)] = Field(
        0.0, description="Coefficient of the router z-loss, the mean squared logsumexp of the router logits."
    )
