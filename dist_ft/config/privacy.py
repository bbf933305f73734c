"""The `privacy` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Strict


class PrivacyConfig(Strict):
    """Differential privacy of the training rows, enabled by setting target_epsilon or noise_multiplier."""

    target_epsilon: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Privacy budget of the whole run; the noise is computed from it."
    )
    delta: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        None, description="delta of (epsilon, delta); must be below 1 / rows. Defaults to 0.1 / rows."
    )
    noise_multiplier: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Standard deviation of the noise divided by max_grad_norm, instead of target_epsilon."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0, description="Norm to which each row's gradient is clipped."
    )
    noise_seed: Annotated[int, Field(ge=0)] | None = Field(
        None,
        description="Seed of noise and sampling; anyone who knows it can remove the noise. Defaults to a secret one.",
    )
    grad_sample_mode: Literal["auto", "loop"] = Field(
        "auto", description="`auto`: Opacus hooks where they are verified to be correct, else `loop`: row by row."
    )

    @property
    def is_on(self) -> bool:
        """Whether differential privacy is enabled."""
        return self.target_epsilon is not None or self.noise_multiplier is not None
