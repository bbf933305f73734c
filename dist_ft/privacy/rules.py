"""What a private run cannot be combined with, known before it starts and without torch; each with its reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config.run import RunConfig
from ..data.read.sets import sources_of
from ..errors import Problem
from ..pretrained.folder import is_known_dense

ENGINES = ("ddp", "fsdp")
METHODS = ("full", "lora", "qlora")
TASKS = (  # whose samples are one row each
    "causal_lm",
    "instruction",
    "masked_lm",
    "sequence_classification",
    "token_classification",
    "seq2seq",
)
SUBSETS = ("mixture", "k_shot", "folds")  # of data: a row's place depends on other rows
MIXES_ROWS = "experts are balanced over all rows of a step, so that no row has a gradient of its own"


def privacy_problems(config: RunConfig) -> Iterator[Problem]:
    """Every unsound or untested mix of a private run."""
    if not config.privacy.is_on:
        return
    if config.privacy.target_epsilon is not None and config.privacy.noise_multiplier is not None:
        rule = "privacy.target_epsilon is set too, and one of them decides"
        yield Problem("privacy.noise_multiplier", rule, "remove one of the two")
    if config.engine.name not in ENGINES:
        rule = f"engine={config.engine.name} adds up gradients before each row's could be clipped"
        yield Problem("engine", rule, f"choose engine={' or '.join(ENGINES)}")
    if config.method.name not in METHODS:
        rule = f"method={config.method.name} was not proven against gradients of single rows"
        yield Problem("method", rule, f"choose method={' or '.join(METHODS)}")
    if config.task.name not in TASKS:
        rule = f"of task={config.task.name} a row is not one sample with a gradient of its own"
        yield Problem("task", rule, f"choose one of {', '.join(TASKS)}")
    for key in SUBSETS:
        if getattr(config.data, key, None) is not None:
            rule = "which rows are sampled, and how often, would depend on other rows"
            yield Problem(f"data.{key}", rule, "remove it, and give the rows as data.train")
    if config.task.packs:
        rule = "a packed sample holds parts of many rows, and a row may reach into several, so none has a bound"
        yield Problem("task.packing", rule, "set task.packing=false")
    if getattr(config.task, "class_weights", None):
        rule = "weights let rows count by their class, which clipping undoes, and balanced ones are counted from rows"
        yield Problem("task.class_weights", rule, "remove it")
    folder = Path(config.model.name_or_path)
    if (folder / "config.json").is_file() and not is_known_dense(config.model.name_or_path):
        yield Problem("model.name_or_path", f"the model has experts: {MIXES_ROWS}", "take a model without experts")
    yield from _selection_problems(config)
    if config.train.resume not in ("auto", "never"):
        rule = "a checkpoint of another run has spent what this one cannot know"
        yield Problem("train.resume", rule, "go on with auto in the run's own folder")


def fixes_length(config: RunConfig, key: str) -> bool:
    """Whether `train.KEY` is a length on which the noise of the steps already taken depends."""
    return config.privacy.target_epsilon is not None and key in ("max_steps", "num_train_epochs")


def takes_rows_together(config: RunConfig) -> bool:
    """Whether hooks are tried, which give the gradients of all rows of a micro-batch at once."""
    # LLM.int8 looks for outlying columns in all rows of a micro-batch, so that a row changes its neighbours' gradients.
    is_apart = config.model.quantization != "int8" and not config.model.gradient_checkpointing
    return config.privacy.grad_sample_mode == "auto" and is_apart


def _selection_problems(config: RunConfig) -> Iterator[Problem]:
    """Choosing a step by rows that are to be kept private spends what nothing accounts for."""
    train = config.train
    chooses = [key for key in ("load_best_model_at_end", "early_stopping_patience") if getattr(train, key)]
    if not chooses:
        return
    trained = {source for key, source in sources_of(config) if key == "data.train"}
    if any(source in trained for key, source in sources_of(config) if key == "data.validation"):
        rule = "a step is chosen by exact scores of rows that are also trained on, which no epsilon accounts for"
        yield Problem(f"train.{chooses[0]}", rule, "set data.validation to other rows, or remove it")
