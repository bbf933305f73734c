"""The keys of `data.augment`."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import Field

from .strict import Count, Strict


class AugmentConfig(Strict):
    """Further training rows, which a library makes of the given ones; the given ones stay as they are."""

    target: Annotated[str, Field(pattern=r"^[A-Za-z_]\w*(\.[A-Za-z_]\w*)+$")] = Field(
        description="Dotted name of a function, or of a class whose objects have `augment(text)` or are called."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="Keywords of the class, or of each call.")
    columns: Annotated[list[str], Field(min_length=1)] = Field(description="Of the format; which texts are changed.")
    copies: Count = Field(1, description="Changed copies beside each row.")
