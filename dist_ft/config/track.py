"""The `track` group."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import Strict


class TrackConfig(Strict):
    """Weights & Biases and the report; metrics are always written to metrics.jsonl and the terminal."""

    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online if an API key is found, offline otherwise."
    )
    project: str = "dist_ft"
    run_name: str | None = Field(None, description="Run name in W&B. Defaults to the top-level run_name.")
    group: str | None = Field(None, description="W&B group of the run, such as the runs of a sweep.")
    tags: list[str] = Field(default_factory=list)
    report: bool = Field(True, description="Write report.html about every minute and at the end.")
