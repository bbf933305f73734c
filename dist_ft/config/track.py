"""The `track` group."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from .strict import Strict

Service = Literal["wandb", "tensorboard", "mlflow", "trackio"]


class TrackConfig(Strict):
    """Trackers and the report; metrics are always written to metrics.jsonl and the terminal."""

    to: list[Service] = Field(
        default_factory=lambda: list[Service](["wandb"]),
        description="Trackers besides metrics.jsonl: wandb, tensorboard, mlflow, trackio.",
    )
    wandb: Literal["auto", "online", "offline", "off"] = Field(
        "auto", description="`auto`: online if an API key is found, offline otherwise."
    )
    project: str = Field("dist_ft", description="Project in W&B and Trackio, experiment in MLflow.")
    run_name: str | None = Field(None, description="Name of the run in trackers. Defaults to the top-level run_name.")
    group: str | None = Field(None, description="W&B group of the run, such as the runs of a sweep.")
    tags: list[str] = Field(default_factory=list, description="W&B tags of the run.")
    report: bool = Field(True, description="Write report.html about every minute and at the end.")

    @property
    def uses_wandb(self) -> bool:
        """Whether W&B tracks the run."""
        return "wandb" in self.to and self.wandb != "off"

    @property
    def others(self) -> list[Service]:
        """The trackers besides W&B, each once."""
        return [name for name in dict.fromkeys(self.to) if name != "wandb"]
