"""The `train` group."""

from __future__ import annotations

from typing import Annotated

from pydantic import Field

from .strict import Count, Strict


class TrainConfig(Strict):
    """How long, how large, how often."""

    max_steps: Count | None = None
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    global_batch_size: Count = Field(32, description="Rows (packed: blocks) of one optimizer step over all ranks.")
    per_device_train_batch_size: Count = Field(4, description="Rows of one micro-batch; accumulation follows.")
    per_device_eval_batch_size: Count = 8
    seed: Annotated[int, Field(ge=0)] = 0
    neftune_noise_alpha: Annotated[float, Field(gt=0)] | None = Field(
        None, description="Noise on embeddings in training (NEFTune): 5 to 15."
    )
    logging_steps: Count = 1
    eval_steps: Count | None = Field(None, description="Also evaluated before the first and after the last step.")
    save_steps: Count | None = Field(None, description="Also saved after the last step.")
    save_total_limit: Count | None = Field(None, description="Newest checkpoints kept; the best one is kept besides.")
    metric_for_best_model: str = Field("loss", description="Which eval/… is meant by best: loss, accuracy, f1 …")
    early_stopping_patience: Count | None = Field(None, description="Evaluations without a better one.")
    load_best_model_at_end: bool = Field(False, description="Export the best evaluated step, not the last.")
    resume: str = Field("auto", description="`auto` (newest sound checkpoint), `never`, or a checkpoint's path.")
    timeout_s: Annotated[float, Field(gt=0)] = Field(600, description="A rank silent for so long is given up.")
