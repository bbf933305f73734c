"""The keys of `data.augment`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from .strict import Count, Strict


class AugmentConfig(Strict):
    """Further training rows, which nlpaug makes of the given ones; the given ones stay as they are."""

    name: Literal["KeyboardAug", "OcrAug", "RandomCharAug", "RandomWordAug", "SpellingAug", "SplitAug"] = Field(
        description="nlpaug's augmenter: of those that need no model and no download."
    )
    options: dict[str, Any] = Field(default_factory=dict, description="The augmenter's keywords, such as aug_char_p.")
    columns: Annotated[list[str], Field(min_length=1)] = Field(description="Of the format; which texts are changed.")
    copies: Count = Field(1, description="Changed copies beside each row.")
