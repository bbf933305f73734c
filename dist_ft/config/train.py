"""The `train` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Count, Strict, Text

DEFAULT_SAVE_MINUTES = 15.0
DEFAULT_SAVE_LIMIT = 2
EPOCH_SAVE_MINUTES = 1.0  # least time between the last checkpoint and that of an epoch
DEFAULT_STOP_BEFORE_S = 120.0


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
    chunked_loss: bool | Literal["auto"] = Field(
        "auto",
        description="Compute head and cross-entropy in chunks of tokens, so that not all logits exist at a time, and "
        "again in the backward. `auto`: for micro-batches whose logits take more than 256 MiB, if the model allows it.",
    )
    logging_steps: Count = 1
    eval_steps: Count | None = Field(
        None, description="Steps between evaluations; also evaluates before the first and after the last step."
    )
    save_steps: Count | None = Field(None, description="Steps between checkpoints; also saves after the last step.")
    save_minutes: Annotated[float, Field(gt=0)] | Literal["auto"] | None = Field(
        "auto",
        description="Minutes between checkpoints. `auto`: 15, and after each epoch, at most once a minute, unless "
        "save_steps is set. With null and without save_steps, only the last step is saved.",
    )
    save_total_limit: Count | Literal["auto"] | None = Field(
        "auto",
        description="Number of newest checkpoints to keep, plus the best one; null keeps all. `auto`: 2, and all if "
        "save_steps is set.",
    )
    on_nonfinite: Literal["stop", "skip"] = Field(
        "stop",
        description="What to do at a step whose loss or gradient norm is not finite, after which weights and moments "
        "are as before: end the run, or go on with the next step (at most ten times in a row).",
    )
    async_save: bool = Field(
        True,
        description="Write checkpoints in the background, from a copy in host memory of what each rank saves. With "
        "false, training waits for the disk.",
    )
    save_final_state: bool = Field(
        True,
        description="Whether the checkpoint of the last step holds the optimizer state, with which training can go on "
        "for more steps. With false, it is a third of the size.",
    )
    metric_for_best_model: str = Field(
        "loss", description="The eval/ metric that defines the best step: loss, accuracy, f1 …"
    )
    early_stopping_patience: Count | None = Field(
        None, description="Stop after this many evaluations without improvement."
    )
    load_best_model_at_end: bool = Field(False, description="Export the best evaluated step instead of the last.")
    resume: Text = Field("auto", description="`auto` (newest valid checkpoint), `never`, or the path of a checkpoint.")
    accept_changes: list[Literal["data", "base", "tokenizer", "template"]] = Field(
        [],
        description="What may differ from the checkpoint that the run resumes from: the training data, the weights of "
        "the base model, the tokenizer, or the chat template. The model card names what was accepted.",
    )
    stop_before_s: Annotated[float, Field(ge=0)] | Literal["auto"] = Field(
        "auto",
        description="Save and stop this many seconds before the time limit of a SLURM job. `auto`: 120, or a tenth of "
        "the time that is left at the start.",
    )
    timeout_s: Annotated[float, Field(gt=0)] = Field(
        600, description="End the run if no rank makes progress for this many seconds."
    )
    restarts: Annotated[int, Field(ge=0)] = Field(
        0,
        description="How often to start the workers again, from the newest checkpoint, after one of them died or hung, "
        "or a library failed; not for errors that would come again, nor after three restarts without a newer one.",
    )

    @property
    def saves_each_epoch(self) -> bool:
        """Whether checkpoints are saved after each epoch."""
        return self.save_minutes == "auto" and self.save_steps is None

    @property
    def minutes_between_saves(self) -> float | None:
        """Minutes between checkpoints; None if the time does not matter."""
        if self.save_minutes == "auto":
            return DEFAULT_SAVE_MINUTES if self.saves_each_epoch else None
        return self.save_minutes

    @property
    def saves_on_the_way(self) -> bool:
        """Whether checkpoints are saved before the last step."""
        return self.save_steps is not None or self.save_minutes is not None

    @property
    def checkpoints_kept(self) -> int | None:
        """Number of newest checkpoints to keep, besides the best one; None for all."""
        if self.save_total_limit == "auto":
            return DEFAULT_SAVE_LIMIT if self.save_steps is None else None
        return self.save_total_limit

    def seconds_before(self, limit_s: float) -> float:
        """Return how many seconds before a time limit to stop, if `limit_s` are left at the start."""
        return min(DEFAULT_STOP_BEFORE_S, limit_s / 10) if self.stop_before_s == "auto" else self.stop_before_s
