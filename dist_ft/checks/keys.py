"""Keys that are read only under a condition: one that was set where nothing reads it is an error (checks.py)."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from ..config.launch import LocalConfig
from ..config.run import RunConfig
from ..data.read.sets import sources_of
from ..data.read.sources import HubSet, resolve
from ..errors import DistFtError, Problem
from ..pretrained.source import is_hub_id


@dataclass(frozen=True)
class ReadWhen:
    """A key that is read only under a condition, and what the user can do where it is not."""

    key: str
    reads: Callable[[RunConfig], bool]
    otherwise: str  # the end of "nothing reads it: …"
    way_out: str


def _packs(config: RunConfig) -> bool:
    return config.task.name in ("causal_lm", "masked_lm") and config.task.packs


def _hub_data(config: RunConfig) -> bool:
    for _, source in sources_of(config):
        with contextlib.suppress(DistFtError):  # a source that names nothing is a problem of its own
            if any(isinstance(found, HubSet) for found in resolve(source)):
                return True
    return False


def _shares_by_size(config: RunConfig) -> bool:
    sets = config.data.mixture or {}
    return len(sets) > 1 and all(part.weight is None for part in sets.values())


OF_SETS = "each set of data.mixture has its own"
SAY_OF_SET = "set it as a key of the set, data.mixture.NAME.KEY"
NO_VALIDATION = "there is no validation data"
GIVE_VALIDATION = "set data.validation, or remove it"
NO_TRACKING = "track.wandb=off"
TRACK = "set track.wandb=auto, or remove it"
NO_PRIVACY = "the run is not private"
ASK_PRIVACY = "set privacy.target_epsilon or privacy.noise_multiplier, or remove it"
READ_WHEN = [
    ReadWhen(
        "model.revision",
        lambda c: is_hub_id(c.model.name_or_path),
        "the model does not come from the hub",
        "remove it, or name a hub id",
    ),
    ReadWhen(
        "task.overlong",
        lambda c: not _packs(c) or c.data.only_tokens,
        "packing cuts documents into blocks, so none is too long",
        "remove it, or set task.packing=false",
    ),
    ReadWhen(
        "task.chat_template",
        lambda c: not c.data.only_tokens,
        "rows of tokens are used as they are",
        "remove it, or give rows of text",
    ),
    ReadWhen(
        "task.label_smoothing",
        lambda c: getattr(c.task, "loss_type", "sigmoid") in ("sigmoid", "robust"),
        "hinge and ipo have no smoothing",
        "remove it, or set task.loss_type to sigmoid or robust",
    ),
    ReadWhen(
        "method.prompt_tuning_init_text",
        lambda c: getattr(c.method, "prompt_tuning_init", None) == "TEXT",
        "the prompt starts at random",
        "set method.prompt_tuning_init=TEXT, or remove it",
    ),
    ReadWhen(
        "method.tokenizer_name_or_path",
        lambda c: getattr(c.method, "prompt_tuning_init", None) == "TEXT",
        "there is no text to read",
        "set method.prompt_tuning_init=TEXT, or remove it",
    ),
    ReadWhen(
        "method.encoder_hidden_size",
        lambda c: getattr(c.method, "prefix_projection", True),
        "without method.prefix_projection there is no network",
        "set method.prefix_projection=true, or remove it",
    ),
    *(ReadWhen(f"data.{key}", lambda c: c.data.mixture is None, OF_SETS, SAY_OF_SET) for key in ("format", "columns")),
    ReadWhen("data.template", lambda c: c.data.mixture is None, OF_SETS, SAY_OF_SET),
    ReadWhen("data.revision", lambda c: c.data.mixture is None, OF_SETS, SAY_OF_SET),
    ReadWhen("data.mixture_temperature", _shares_by_size, "the shares are not by size", "remove it, or all weights"),
    ReadWhen("data.fold", lambda c: c.data.folds is not None, "there are no folds", "set data.folds, or remove it"),
    ReadWhen(
        "data.subset_seed",
        lambda c: any((c.data.folds, c.data.k_shot, *(part.k_shot for part in (c.data.mixture or {}).values()))),
        "nothing is drawn",
        "set data.k_shot or data.folds, or remove it",
    ),
    ReadWhen("data.revision", _hub_data, "no source comes from the hub", "remove it, or name a hub id"),
    ReadWhen("train.eval_steps", lambda c: c.data.has("validation"), NO_VALIDATION, GIVE_VALIDATION),
    ReadWhen(
        "train.per_device_eval_batch_size",
        lambda c: c.data.has("validation") or c.task.name == "preference",  # which takes its reference by it
        NO_VALIDATION,
        GIVE_VALIDATION,
    ),
    ReadWhen("train.early_stopping_patience", lambda c: c.data.has("validation"), NO_VALIDATION, GIVE_VALIDATION),
    ReadWhen(
        "train.early_stopping_patience",
        lambda c: not c.data.has("validation") or c.train.eval_steps is not None,
        "without train.eval_steps no evaluation comes before the end",
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
            and (c.train.load_best_model_at_end or c.train.early_stopping_patience or c.train.save_steps)
        ),
        "nothing asks which step was the best",
        "set train.load_best_model_at_end=true or train.early_stopping_patience, or remove it",
    ),
    ReadWhen(
        "train.save_total_limit",
        lambda c: c.train.save_steps is not None,
        "without train.save_steps only the last step is saved",
        "set train.save_steps, or remove it",
    ),
    ReadWhen(
        "train.neftune_noise_alpha",
        lambda c: c.task.name != "seq2seq",
        "the noise is for models that read one text",
        "remove it; model.dropout works with every task",
    ),
    *(
        ReadWhen(f"privacy.{key}", lambda c: c.privacy.is_on, NO_PRIVACY, ASK_PRIVACY)
        for key in ("delta", "max_grad_norm", "noise_seed", "grad_sample_mode")
    ),
    ReadWhen("data.shuffle", lambda c: not c.privacy.is_on, "private runs sample each row at random", "remove it"),
    ReadWhen(
        "optim.max_grad_norm",
        lambda c: not c.privacy.is_on,
        "private runs clip each row's gradient",
        "set privacy.max_grad_norm",
    ),
    ReadWhen("track.project", lambda c: c.track.wandb != "off", NO_TRACKING, TRACK),
    ReadWhen("track.run_name", lambda c: c.track.wandb != "off", NO_TRACKING, TRACK),
    ReadWhen("track.group", lambda c: c.track.wandb != "off", NO_TRACKING, TRACK),
    ReadWhen("track.tags", lambda c: c.track.wandb != "off", NO_TRACKING, TRACK),
    ReadWhen(
        "launch.port",
        lambda c: not (isinstance(c.launch, LocalConfig) and c.launch.workers_per_node == 1),
        "a single worker has no one to meet",
        "remove it, or set launch.workers_per_node=2",
    ),
]


def unread_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    for rule in READ_WHEN:
        if rule.key in origins and not rule.reads(config) and value_of(config, rule.key) not in (None, []):
            yield Problem(where_of(rule.key, origins), f"nothing reads it: {rule.otherwise}", rule.way_out)


def value_of(config: RunConfig, key: str) -> Any:
    section, _, rest = key.partition(".")
    return getattr(getattr(config, section), rest, None)


def where_of(key: str, origins: Mapping[str, str]) -> str:
    return f"{key} ({origins[key]})" if origins.get(key) else key
