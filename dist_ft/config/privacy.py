"""The `privacy` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class PrivacyConfig(Strict):
    """Differential privacy of the training rows; on where a target epsilon or a noise multiplier is given."""

    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Epsilon that the whole run may spend; the noise follows from it."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="Of (epsilon, delta); below 1 / rows. A tenth of that if not given."
    )
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Deviation of the noise over max_grad_norm, instead of target_epsilon."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(1.0, description="Norm to which each row's gradient is cut.")
    noise_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of noise and sampling; who knows it can take the noise off. A secret one if not given."
    )
    grad_sample_mode: Literal["auto", "loop"] = Field(
        "auto", description="`auto`: Opacus's hooks where they prove right, else `loop`: row by row."
    )

    @property
    def is_on(self) -> bool:
        """Whether anything is asked for."""
        return self.target_epsilon is not None or self.noise_multiplier is not None
