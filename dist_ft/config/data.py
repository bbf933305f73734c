"""The `data` group."""

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


DataFormat = Literal[
    "auto",
    "text",
    "prompt_completion",
    "messages",
    "sharegpt",
    "alpaca",
    "labelled",
    "tagged",
    "source_target",
    "squad",
    "pairs",
    "tokens",
]
Sources = str | list[str]
SetName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$", max_length=60)]


class DataSet(Strict):
    """One set of a mixture; its keys mean what those of `data` mean."""

    train: Sources
    validation: Sources | None = None
    test: Sources | None = None
    weight: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Its share of the samples is this over the sum of all sets' weights; give all or none."
    )
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="The format's name of a column → the data's.")
    template: dict[str, str] = Field(default_factory=dict, description="The format's column → a text with {COLUMN}.")
    revision: str | None = Field(None, description="Hub revision of the data.")
    augment: AugmentConfig | None = Field(None, description="Changed copies of its training rows.")
    k_shot: Count | None = Field(None, description="Learn from so many of its rows of each label, by data.subset_seed.")


class DataConfig(Strict):
    """Where rows come from. A source is a file, a glob, a folder or a hub id; several make one data set."""

    train: Sources | None = Field(None, description="Rows to learn from; or give data.mixture.")
    validation: Sources | None = None
    test: Sources | None = None
    format: DataFormat = "auto"
    columns: dict[str, str] = Field(default_factory=dict, description="The format's name of a column → the data's.")
    template: dict[str, str] = Field(
        default_factory=dict,
        description="The format's column → a text with {COLUMN} of the data in it; `{COLUMN}` alone keeps the value.",
    )
    revision: str | None = Field(None, description="Hub revision of the data.")
    mixture: dict[SetName, DataSet] | None = Field(
        None, description="Name → a data set; each keeps its share of the samples throughout the run."
    )
    mixture_temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="T: without weights, shares are as samples^(1/T). 1: all rows alike; large T: all sets alike."
    )
    k_shot: Count | None = Field(None, description="Learn from so many rows of each label, drawn by subset_seed.")
    folds: Annotated[int, Field(ge=2)] | None = Field(
        None, description="Deal the training rows in so many folds, alike in labels; one is the validation data."
    )
    fold: Annotated[int, Field(ge=0)] | None = Field(None, description="Which one, from 0; the first if not given.")
    subset_seed: Annotated[int, Field(ge=0)] | None = Field(
        None, description="Of k_shot and folds; train.seed if not given."
    )
    augment: AugmentConfig | None = Field(None, description="Changed copies of training rows.")
    shuffle: bool = Field(True, description="A new order each epoch from train.seed; false keeps the file order.")
    cache_dir: str | None = Field(None, description="Prepared data and models; ~/.cache/dist_ft if not given.")

    def has(self, split: str) -> bool:
        """Whether there are rows for `train`, `validation` or `test`."""
        return bool(self.sources(split)) or any(getattr(part, split) for part in (self.mixture or {}).values())

    def sources(self, split: str) -> Sources | None:
        """Where a split's rows are; of folds the validation rows are among the training rows."""
        found: Sources | None = self.train if split == "validation" and self.folds else getattr(self, split)
        return found

    @property
    def only_tokens(self) -> bool:
        """Whether all rows are tokens already, so that no tokenizer is needed."""
        parts = [self] if self.mixture is None else list(self.mixture.values())
        return all(part.format == "tokens" for part in parts)
