"""Keys that are used only under a condition: setting one where it has no effect is an error."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config.data import held_out
from ..config.launch import LocalConfig
from ..config.run import RunConfig
from ..data.read.folders import ending_of
from ..data.read.remote import DataFile
from ..data.read.sets import SPLITS, sets_of
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem
from ..pretrained.source import is_hub_id


@dataclass(frozen=True)
class ReadWhen:
    """A key that is used only under a condition, and how to fix a configuration in which it is not."""

    key: str
    reads: Callable[[RunConfig], bool]
    otherwise: str  # completes the message "has no effect: …"
    way_out: str


def _packs(config: RunConfig) -> bool:
    return config.task.name in ("causal_lm", "masked_lm") and config.task.packs


def _has_names(config: RunConfig) -> bool:
    return config.track.uses_wandb or bool({"mlflow", "trackio"} & set(config.track.to))


def _hub_data(config: RunConfig) -> bool:
    return any(isinstance(found, HubSet) for found in _sources(config))


def _files_of(config: RunConfig, *endings: str) -> bool:
    return any(not isinstance(found, HubSet) and ending_of(found) in endings for found in _sources(config))


def _sources(config: RunConfig) -> Iterator[DataFile | HubSet]:
    for split in SPLITS:
        for alone in sets_of(config, split).values():
            with contextlib.suppress(DistFtError):  # invalid sources are reported by data_problems
                yield from resolve(alone.data.sources(split) or [], alone.data.source_split(split))


def _draws_rows(config: RunConfig) -> bool:
    sets = [alone.data for alone in sets_of(config).values()]
    return any(data.folds or data.k_shot or held_out(data.validation) for data in sets)


def _shares_by_size(config: RunConfig) -> bool:
    sets = config.data.mixture or {}
    return len(sets) > 1 and all(part.weight is None for part in sets.values())


OWN_KEYS = (
    "format",
    "columns",
    "template",
    "revision",
    "delimiter",
    "sample_by",
    "max_rows",
    "duplicates",
    "invalid_rows",
)
OF_SETS = "each set of data.mixture has its own"
SAY_OF_SET = "set it for each data set, as data.mixture.NAME.KEY"
CONVERSATION = (
    "chat_template",
    "chat_template_kwargs",
    "reasoning",
    "train_on",
    "train_on_eos",
    "one_row_per_turn",
)
LANGUAGE_MODELING = ("causal_lm", "instruction", "masked_lm", "seq2seq", "preference")
TOKENIZED = "tokenized rows are used unchanged"
NO_VALIDATION = "there is no validation data"
GIVE_VALIDATION = "set data.validation, or remove it"
NO_WANDB = "W&B does not track this run (track.to, track.wandb)"
WITH_WANDB = "add wandb to track.to and set track.wandb=auto, or remove it"
NO_TRACKER = "no tracker of this run has names (track.to, track.wandb)"
WITH_TRACKER = "add wandb, mlflow or trackio to track.to, or remove it"
NO_PRIVACY = "differential privacy is not enabled"
ASK_PRIVACY = "set privacy.target_epsilon or privacy.noise_multiplier, or remove it"
READ_WHEN = [
    ReadWhen(
        "model.revision",
        lambda c: is_hub_id(c.model.name_or_path),
        "the model does not come from the Hub",
        "remove it, or set model.name_or_path to a Hub ID",
    ),
    ReadWhen(
        "task.overlong",
        lambda c: not _packs(c) or c.data.only_tokens,
        "packing splits documents into blocks, so none is too long",
        "remove it, or set task.packing=false",
    ),
    *(
        ReadWhen(f"task.{key}", lambda c: not c.data.only_tokens, TOKENIZED, "remove it, or use rows of text")
        for key in CONVERSATION
    ),
    ReadWhen(
        "task.label_smoothing",
        lambda c: getattr(c.task, "loss_type", "sigmoid") in ("sigmoid", "robust"),
        "loss_type hinge and ipo do not use label smoothing",
        "remove it, or set task.loss_type to sigmoid or robust",
    ),
    ReadWhen(
        "method.prompt_tuning_init_text",
        lambda c: getattr(c.method, "prompt_tuning_init", None) == "TEXT",
        "the prompt is not initialized from a text",
        "set method.prompt_tuning_init=TEXT, or remove it",
    ),
    ReadWhen(
        "method.tokenizer_name_or_path",
        lambda c: getattr(c.method, "prompt_tuning_init", None) == "TEXT",
        "there is no text to tokenize",
        "set method.prompt_tuning_init=TEXT, or remove it",
    ),
    ReadWhen(
        "method.encoder_hidden_size",
        lambda c: getattr(c.method, "prefix_projection", True),
        "without method.prefix_projection there is no MLP",
        "set method.prefix_projection=true, or remove it",
    ),
    *(ReadWhen(f"data.{key}", lambda c: c.data.mixture is None, OF_SETS, SAY_OF_SET) for key in OWN_KEYS),
    ReadWhen(
        "data.special_tokens_in_text",
        lambda c: hasattr(c.task, "chat_template") and not c.data.only_tokens,
        "no messages are rendered",
        "remove it; texts without messages keep their special tokens",
    ),
    ReadWhen(
        "data.delimiter",
        lambda c: _files_of(c, ".csv", ".tsv"),
        "no source is a CSV file",
        "remove it, or use a CSV file as source",
    ),
    ReadWhen(
        "data.sample_by",
        lambda c: _files_of(c, ".txt"),
        "no source is a .txt file",
        "remove it, or use a .txt file as source",
    ),
    ReadWhen(
        "data.mixture_temperature",
        _shares_by_size,
        "the shares are not based on the sizes of several data sets",
        "remove it, or remove all weights",
    ),
    ReadWhen("data.fold", lambda c: c.data.folds is not None, "data.folds is not set", "set data.folds, or remove it"),
    ReadWhen(
        "data.subset_seed",
        _draws_rows,
        "no rows are drawn at random",
        "set data.k_shot, data.folds or a share as data.validation, or remove it",
    ),
    ReadWhen("data.revision", _hub_data, "no source comes from the Hub", "remove it, or use a Hub ID as source"),
    ReadWhen("train.eval_steps", lambda c: c.data.has("validation"), NO_VALIDATION, GIVE_VALIDATION),
    ReadWhen(
        "train.per_device_eval_batch_size",
        lambda c: c.data.has("validation") or c.task.name == "preference",  # also for reference log-probs
        NO_VALIDATION,
        GIVE_VALIDATION,
    ),
    ReadWhen("train.early_stopping_patience", lambda c: c.data.has("validation"), NO_VALIDATION, GIVE_VALIDATION),
    ReadWhen(
        "train.early_stopping_patience",
        lambda c: not c.data.has("validation") or c.train.eval_steps is not None,
        "without train.eval_steps there is no evaluation before the end of training",
        "set train.eval_steps, or remove it",
    ),
    ReadWhen(
        "train.load_best_model_at_end",
        lambda c: not c.train.load_best_model_at_end or bool(c.data.has("validation") and c.train.eval_steps),
        "without train.eval_steps and data.validation only the last step is evaluated",
        "set both, or remove it",
    ),
    ReadWhen(
        "train.metric_for_best_model",
        lambda c: bool(
            c.data.has("validation")
            and (c.train.load_best_model_at_end or c.train.early_stopping_patience or c.train.saves_on_the_way)
        ),
        "the best step is not used",
        "set train.load_best_model_at_end=true or train.early_stopping_patience, or remove it",
    ),
    ReadWhen(
        "train.save_total_limit",
        lambda c: c.train.saves_on_the_way,
        "with train.save_minutes=null and without train.save_steps only the last step is saved",
        "set train.save_steps, or remove it",
    ),
    ReadWhen(
        "train.on_nonfinite",
        lambda c: not c.privacy.is_on,
        "private runs end at a step that is not finite, because each step has its share of the budget",
        "remove it",
    ),
    ReadWhen(
        "train.accept_changes",
        lambda c: c.train.resume != "never",
        "train.resume=never resumes from no checkpoint",
        "remove it",
    ),
    ReadWhen(
        "train.neftune_noise_alpha",
        lambda c: c.task.name != "seq2seq",
        "NEFTune is not supported with encoder-decoder models",
        "remove it; model.dropout is supported with every task",
    ),
    ReadWhen(
        "train.chunked_loss",
        lambda c: c.task.name in LANGUAGE_MODELING and not c.privacy.is_on,
        "only language modeling without differential privacy computes losses in chunks",
        "remove it",
    ),
    *(
        ReadWhen(f"privacy.{key}", lambda c: c.privacy.is_on, NO_PRIVACY, ASK_PRIVACY)
        for key in ("delta", "max_grad_norm", "noise_seed", "grad_sample_mode")
    ),
    ReadWhen("data.shuffle", lambda c: not c.privacy.is_on, "private runs sample each row at random", "remove it"),
    ReadWhen(
        "optim.max_grad_norm",
        lambda c: not c.privacy.is_on,
        "private runs clip the gradient of each row instead",
        "remove it, and set privacy.max_grad_norm",
    ),
    ReadWhen("track.wandb", lambda c: "wandb" in c.track.to, "track.to does not name wandb", "remove one of them"),
    ReadWhen("track.project", _has_names, NO_TRACKER, WITH_TRACKER),
    ReadWhen("track.run_name", _has_names, NO_TRACKER, WITH_TRACKER),
    ReadWhen("track.group", lambda c: c.track.uses_wandb, NO_WANDB, WITH_WANDB),
    ReadWhen("track.tags", lambda c: c.track.uses_wandb, NO_WANDB, WITH_WANDB),
    *(
        ReadWhen(
            f"launch.container_{key}",
            lambda c: getattr(c.launch, "container", None) is not None,
            "the workers run in no container",
            "set launch.container, or remove it",
        )
        for key in ("runtime", "mounts", "python")
    ),
    ReadWhen(
        "train.restarts",
        lambda c: c.launch.name != "slurm" or not c.train.restarts,
        "SLURM starts jobs again",
        "set launch.requeue=true, or remove it",
    ),
    ReadWhen(
        "train.restarts",
        lambda c: c.train.resume == "auto" or not c.train.restarts,
        "workers that start again go on from the newest checkpoint only with train.resume=auto",
        "remove train.resume, or train.restarts",
    ),
    ReadWhen(
        "launch.port",
        lambda c: not (isinstance(c.launch, LocalConfig) and c.launch.workers_per_node == 1),
        "a single worker needs no rendezvous",
        "remove it, or set launch.workers_per_node=2",
    ),
]


def unread_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Yield a problem for each key that the user set although it has no effect in this configuration."""
    for rule in READ_WHEN:
        if rule.key in origins and not rule.reads(config) and value_of(config, rule.key) not in (None, []):
            why = origins.get("data.validation") if rule.otherwise == NO_VALIDATION else None
            otherwise = f"{rule.otherwise} ({why})" if why else rule.otherwise
            yield Problem(where_of(rule.key, origins), f"has no effect: {otherwise}", rule.way_out)


def value_of(config: RunConfig, key: str) -> Any:
    """Return the value of a key `SECTION.NAME`, or None if the section has no such key."""
    section, _, rest = key.partition(".")
    return getattr(getattr(config, section), rest, None)


def where_of(key: str, origins: Mapping[str, str]) -> str:
    """Return the key, followed by its origin in parentheses if that is known."""
    return f"{key} ({origins[key]})" if origins.get(key) else key
