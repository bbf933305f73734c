"""The `track` group."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import Strict


class TrackConfig(Strict):
    """Weights & Biases; metrics.jsonl and the terminal are always there."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online where a key is found, offline otherwise."
    )
    project: str = "dist_ft"
    run_name: str | None = Field(None, description="The run's name in W&B; the top run_name if not given.")
    group: str | None = Field(None, description="Under which W&B gathers runs, such as those of a sweep.")
    tags: list[str] = Field(default_factory=list)
