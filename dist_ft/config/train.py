"""The `train` group."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .strict import Count, Strict, Text


class TrainConfig(Strict):
    """Run length, batch sizes, and intervals of logging, evaluation and checkpoints."""

    max_steps: Count | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Count = Field(
        32,
        description="Rows (with packing: packed samples) per optimizer step, over all ranks. Unless it is set, it"
        " adapts to a number of workers that cannot divide it.",
    )
    per_device_train_batch_size: Count = Field(
        4,
        description="Rows per micro-batch; the number of gradient accumulation steps is derived from it. Unless it is"
        " set, it is an upper bound.",
    )
    per_device_eval_batch_size: Count = 8
    seed: Annotated[int, Field(ge=0, lt=2**64)] = 0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Scale of the noise added to embeddings in training (NEFTune); usually 5 to 15."
    )
    logging_steps: Count = 1
    eval_steps: Count | None = Field(
        None, description="Steps between evaluations; also evaluates before the first and after the last step."
    )
    save_steps: Count | None = Field(None, description="Steps between checkpoints; also saves after the last step.")
    save_total_limit: Count | None = Field(None, description="Number of newest checkpoints to keep, plus the best one.")
    metric_for_best_model: str = Field(
        "loss", description="The eval/ metric that defines the best step: loss, accuracy, f1 …"
    )
    early_stopping_patience: Count | None = Field(
        None, description="Stop after this many evaluations without improvement."
    )
    load_best_model_at_end: bool = Field(False, description="Export the best evaluated step instead of the last.")
    resume: Text = Field("auto", description="`auto` (newest valid checkpoint), `never`, or the path of a checkpoint.")
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        600, description="End the run if no rank makes progress for this many seconds."
    )
