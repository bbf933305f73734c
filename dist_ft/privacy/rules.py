"""Checks of what differential privacy cannot be combined with, and why; they need no torch."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path

from ..config.data import held_out
from ..config.run import RunConfig
from ..data.read.remote import DataFile
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem
from ..pretrained.folder import is_known_dense

ENGINES = ("ddp", "fsdp")
METHODS = ("full", "lora", "qlora")
TASKS = (  # tasks in which each sample is one row
    "causal_lm",
    "instruction",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "seq2seq",
)
SUBSETS = {  # keys of `data` that make the use of a row depend on other rows, and values that do not
    "mixture": None,
    "k_shot": None,
    "folds": None,
    "max_rows": None,
    "duplicates": "keep",
}
MIXES_ROWS = "experts are balanced over all rows of a step, so that rows have no separate gradients"


def privacy_problems(config: RunConfig) -> Iterator[Problem]:
    """Yield every unsound or unverified combination with differential privacy."""
    if not config.privacy.is_on:
        return
    if config.privacy.target_epsilon is not None and config.privacy.noise_multiplier is not None:
        rule = "privacy.target_epsilon is also set, but only one can be used"
        yield Problem("privacy.noise_multiplier", rule, "remove privacy.target_epsilon or privacy.noise_multiplier")
    if config.engine.name not in ENGINES:
        rule = f"engine={config.engine.name} reduces gradients before the gradient of each row could be clipped"
        yield Problem("engine", rule, f"set engine={' or '.join(ENGINES)}")
    if getattr(config.engine, "gradient_reduction", "micro_batch") != "micro_batch":
        rule = "gradients of rows are clipped and reduced micro-batch by micro-batch"
        yield Problem("engine.gradient_reduction", rule, "set engine.gradient_reduction=micro_batch")
    if config.method.name not in METHODS:
        rule = f"method={config.method.name} is not verified against per-row gradients"
        yield Problem("method", rule, f"set method={' or '.join(METHODS)}")
    if config.task.name not in TASKS:
        rule = f"a row of task={config.task.name} is not a single sample with its own gradient"
        yield Problem("task", rule, f"set task to one of {', '.join(TASKS)}")
    rule = "which rows are sampled, and how often, would depend on other rows"
    for key, harmless in SUBSETS.items():
        if getattr(config.data, key) != harmless:
            yield Problem(f"data.{key}", rule, "remove it, and set data.train to the rows")
    if held_out(config.data.validation) is not None:
        yield Problem("data.validation", rule, "set it to a file with rows that data.train does not have")
    if config.task.packs:
        rule = "packed samples contain parts of several rows, so the influence of a single row is not bounded"
        yield Problem("task.packing", rule, "set task.packing=false")
    if getattr(config.task, "one_row_per_turn", False):
        rule = "a row would be several samples, so its influence is not bounded by clipping the gradient of each"
        yield Problem("task.one_row_per_turn", rule, "set task.one_row_per_turn=false")
    if getattr(config.task, "class_weights", None):
        rule = "clipping undoes class weights, and balanced weights are counted from the private rows"
        yield Problem("task.class_weights", rule, "remove it")
    folder = Path(config.model.name_or_path)
    if (folder / "config.json").is_file() and not is_known_dense(config.model.name_or_path):
        yield Problem("model.name_or_path", f"the model has experts: {MIXES_ROWS}", "use a model without experts")
    yield from _selection_problems(config)
    if config.train.resume not in ("auto", "never"):
        rule = "the privacy budget spent by a checkpoint of another run is not known"
        yield Problem("train.resume", rule, "set train.resume=auto, and resume in the folder of that run")


def fixes_length(config: RunConfig, key: str) -> bool:
    """Return whether `train.KEY` is a run length from which the noise of past steps was computed."""
    return config.privacy.target_epsilon is not None and key in ("max_steps", "num_train_epochs")


def takes_rows_together(config: RunConfig) -> bool:
    """Return whether to try hooks that compute the gradients of all rows of a micro-batch at once."""
    # LLM.int8 detects outlier columns over all rows of a micro-batch, so rows influence the gradients of other rows.
    is_apart = config.model.quantization != "int8" and not config.model.gradient_checkpointing
    return config.privacy.grad_sample_mode == "auto" and is_apart


def _selection_problems(config: RunConfig) -> Iterator[Problem]:
    """Reject selecting a step by scores of private rows, which the privacy accounting does not cover."""
    train = config.train
    chooses = [key for key in ("load_best_model_at_end", "early_stopping_patience") if getattr(train, key)]
    if not chooses:
        return
    trained, scored = ({str(found) for found in _files(config, split)} for split in ("train", "validation"))
    if trained & scored:
        rule = "the step is selected by exact scores of training rows, which epsilon does not account for"
        yield Problem(f"train.{chooses[0]}", rule, "set data.validation to other rows, or remove it")


def _files(config: RunConfig, split: str) -> list[DataFile | HubSet]:
    with contextlib.suppress(DistFtError):  # invalid sources are reported by checks/data.py
        if sources := config.data.sources(split):
            return resolve(sources, split)
    return []
