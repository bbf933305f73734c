"""Everything that can be known to be wrong before a worker starts, all of it at once and without torch.

The schema knows what a key is; this module knows what keys mean together and what they name: files, folders, an
existing run. Nothing is silently ignored: a key that the user set and that nothing would read is an error.
"""

from __future__ import annotations

import collections
import itertools
import os
import shutil
import sys
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .data.augment_rules import augment_problems, missing_nlpaug
from .data.chosen import choice_problems
from .data.rows import read_rows
from .data.sets import key_of, set_problems, sets_of
from .data.sources import HubSet, resolve
from .errors import DistFtError, Problem, RequestError
from .plan import RUN_FILE, read_plan
from .pretrained import is_known_dense, model_problems, weight_bytes
from .privacy_rules import fixes_length, privacy_problems
from .read_when import READ_WHEN, sources
from .schema import RunConfig
from .schema_method import LoraKeys

MIB = 2**20
LEAST_ROOM_BYTES = 256 * MIB  # logs, metrics and an adapter, where the weights' size is not known
FULL_COPIES = 4  # of the weights: a checkpoint holds them with two moments, the export once more

FIRST_ROWS = 20  # of each file: a wrong encoding, delimiter or format shows at once

# What may differ when a run goes on: how it is executed, watched and for how long, never what is learned from what.
MAY_CHANGE = {
    "model": {"attn_implementation", "gradient_checkpointing", "trust_remote_code"},
    "data": {"cache_dir", "validation", "test"},
    "train": {
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "early_stopping_patience",
        "resume",
        "timeout_s",
    },
}


def check(config: RunConfig, set_keys: Mapping[str, str] | Collection[str] = ()) -> list[Problem]:
    """Every problem of a valid configuration; empty if there is none.

    Args:
        config: what was composed.
        set_keys: dotted keys that the user set, with their origins if it is a mapping.
    """
    origins = dict(set_keys) if isinstance(set_keys, Mapping) else dict.fromkeys(set_keys, "")
    return [
        *_unread_problems(config, origins),
        *_mixture_problems(config, origins),
        *_length_problems(config, origins),
        *_method_problems(config, origins),
        *_token_problems(config, origins),
        *_reference_problems(config, origins),
        *set_problems(config),
        *choice_problems(config),
        *augment_problems(config),
        *model_problems(config.model),
        *_data_problems(config),
        *_template_problems(config),
        *_run_problems(config),
        *privacy_problems(config),
    ]


def check_machine(config: RunConfig) -> list[Problem]:
    """What this machine lacks for the run: a folder to write to, room, or a library that only some runs need."""
    return [*_disk_problems(config), *_library_problems(config)]


def _library_problems(config: RunConfig) -> Iterator[Problem]:
    """A job whose own shell lines choose its Python knows itself what is there."""
    if config.privacy.is_on and not getattr(config.launch, "setup", None) and find_spec("opacus") is None:
        rule = f"it needs the package opacus, which is not installed in {sys.executable}"
        yield Problem("privacy", rule, "pip install 'dist-ft[privacy]', or remove it")
    for name, alone in sets_of(config).items():
        if alone.data.augment is not None and not getattr(config.launch, "setup", None):
            problem = missing_nlpaug(key_of(name, "augment"))
            yield from [problem] if problem else []
    scheme = config.model.quantization or "none"
    if scheme != "none" and not getattr(config.launch, "setup", None) and find_spec("bitsandbytes") is None:
        rule = f"{scheme} needs the package bitsandbytes, which is not installed in {sys.executable}"
        yield Problem("model.quantization", rule, "pip install bitsandbytes, or set model.quantization=none")


def _disk_problems(config: RunConfig) -> list[Problem]:
    folder = Path(config.output_dir)
    while not folder.exists():
        folder = folder.parent
    if not folder.is_dir():
        return [Problem("output_dir", f"{folder} is a file, so {config.output_dir} cannot be made", "set output_dir=…")]
    if not os.access(folder, os.W_OK | os.X_OK):
        return [Problem("output_dir", f"{folder} cannot be written to", "set output_dir to a folder of yours")]
    weights = weight_bytes(config.model.name_or_path)
    needed = max(LEAST_ROOM_BYTES, (weights or 0) * FULL_COPIES if config.method.whole else 0)
    free = shutil.disk_usage(folder).free
    if free < needed:
        rule = f"{free // MIB} MiB are free in {folder}; the run needs some {needed // MIB} MiB"
        return [Problem("output_dir", rule, "make room, or set output_dir to a larger disk")]
    return []


def _unread_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    for rule in READ_WHEN:
        if rule.key in origins and not rule.reads(config) and _value(config, rule.key) not in (None, []):
            yield Problem(_where(rule.key, origins), f"nothing reads it: {rule.otherwise}", rule.way_out)


def _mixture_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Keys for experts where config.json tells of none; of a model that is not here yet the workers tell."""
    keys = [key for key in origins if key.startswith("moe.") and _value(config, key) is not None]
    if keys and is_known_dense(config.model.name_or_path):
        for key in keys:
            rule = "nothing reads it: the model has no mixture of experts"
            yield Problem(_where(key, origins), rule, "remove it, or name another model")


def _length_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    train = config.train
    if train.max_steps is not None and train.num_train_epochs is not None:
        where = _where("train.max_steps", origins)
        yield Problem(where, "train.num_train_epochs is set too, and one of them decides", "remove one of the two")
    if train.max_steps is None and train.num_train_epochs is None:
        rule = "the length of the run is not given"
        yield Problem("train", rule, "set train.max_steps or train.num_train_epochs")


def _method_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """What a method cannot be combined with."""
    method = config.method
    if method.virtual_tokens and config.task.packs:
        rule = f"method={method.name} puts virtual tokens in front of each row, and a packed row has many documents"
        yield Problem(_where("task.packing", origins), rule, "set task.packing=false, or choose another method")
    if method.virtual_tokens and not config.task.keeps_virtual_tokens:
        rule = (
            f"method={method.name} keeps nothing but its tokens, and the new head of task={config.task.name} must learn"
        )
        yield Problem(_where("method.name", origins), rule, "choose method=lora, or another method")
    if method.virtual_tokens and config.task.name == "seq2seq":
        rule = f"method={method.name} would stand in front of what the decoder writes too, which nothing here reads"
        yield Problem(_where("method.name", origins), rule, "choose method=lora, adapter or ia3")
    if method.name == "prefix" and config.model.gradient_checkpointing:
        rule = "the prefix reaches attention as a cache of keys and values, which recomputed blocks do not get"
        way_out = "set model.gradient_checkpointing=false, or choose method=prompt"
        yield Problem(_where("model.gradient_checkpointing", origins), rule, way_out)
    if config.model.from_scratch and method.name != "full":
        rule = f"method={method.name} leaves weights as they were drawn at random, and those know nothing"
        yield Problem(_where("model.from_scratch", origins), rule, "choose method=full, or set it to false")
    if config.model.add_tokens and method.name not in ("full", "lora", "qlora"):
        rule = f"method={method.name} does not train the new tokens' embeddings, so they would never mean anything"
        yield Problem(_where("model.add_tokens", origins), rule, "choose method=lora or full, or remove it")
    if getattr(config.task, "new_head", False) and not method.whole:
        rule = f"the head shares its weights with the embeddings, which method={method.name} cannot store"
        yield Problem(_where("task.new_head", origins), rule, "choose method=full, or a folder that has a head")
    quantization = config.model.quantization or "none"
    if method.name == "qlora" and quantization == "none":
        rule = "method=qlora is LoRA over a quantised base, and none was asked for"
        yield Problem(_where("model.quantization", origins), rule, "set it to nf4 or int8, or choose method=lora")
    if quantization != "none" and method.name not in ("lora", "qlora"):
        rule = f"a base in {quantization} cannot learn, and method={method.name} " + (
            "trains its weights" if method.whole else "is proven over whole weights only"
        )
        yield Problem(_where("model.quantization", origins), rule, "choose method=qlora, or set it to none")
    if quantization != "none" and getattr(method, "use_dora", False):
        rule = "DoRA needs the norms of whole weights, which a quantised base does not hold"
        yield Problem(_where("method.use_dora", origins), rule, "set method.use_dora=false")
    if quantization != "none" and isinstance(method, LoraKeys) and method.moves_base:
        rule = f"{method.init_lora_weights} changes the base, and what it leaves would have to be quantised anew"
        yield Problem(_where("method.init_lora_weights", origins), rule, "remove it, or set model.quantization=none")
    if method.name == "prompt" and method.prompt_tuning_init == "TEXT" and not method.prompt_tuning_init_text:
        rule = "prompt_tuning_init=TEXT starts from a text, and none is given"
        yield Problem("method.prompt_tuning_init_text", rule, "set it, or method.prompt_tuning_init=SAMPLE_VOCAB")


def _token_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """What can be wrong with added tokens before the tokenizer is read."""
    counts = collections.Counter(config.model.add_tokens)
    if twice := [token for token, count in counts.items() if count > 1]:
        rule = f"{', '.join(map(repr, twice))} stands there more than once"
        yield Problem(_where("model.add_tokens", origins), rule, "name each token once")


def _reference_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Preferences are learned against the model as it starts, which must be one to stay near to."""
    if config.task.name != "preference":
        return
    if config.model.from_scratch:
        rule = "the run would be held near weights that were drawn at random, and those know nothing"
        yield Problem(_where("model.from_scratch", origins), rule, "set it to false, and train on answers first")
    if config.method.virtual_tokens:
        rule = f"method={config.method.name} starts with virtual tokens that disturb the model, which is its reference"
        yield Problem("method.name", rule, "choose method=lora, or another that starts as the base")


def _template_problems(config: RunConfig) -> Iterator[Problem]:
    template = getattr(config.task, "chat_template", None)
    if template not in (None, "chatml") and not Path(template).is_file():
        yield Problem("task.chat_template", f"{template}: no such file", "name a Jinja file, or chatml")


def _data_problems(config: RunConfig) -> Iterator[Problem]:
    """Sources that name nothing, and files whose first rows cannot be read; preparing reads the rest."""
    for key, source in sources(config):
        yield from (replace(problem, where=f"{key}, {problem.where}") for problem in _first_rows_problems(source))


def _first_rows_problems(source: str) -> list[Problem]:
    try:
        for file in resolve(source):
            if not isinstance(file, HubSet):
                collections.deque(itertools.islice(read_rows(str(file)), FIRST_ROWS), maxlen=0)
    except DistFtError as error:
        return list(error.problems)
    return []


def _run_problems(config: RunConfig) -> Iterator[Problem]:
    """An existing folder of the run must be this run's, and a checkpoint that is named must exist."""
    folder = Path(config.output_dir)
    resume = config.train.resume
    if resume not in ("auto", "never") and not Path(resume).exists():
        yield Problem("train.resume", f"{resume}: no such checkpoint", "name a folder runs/NAME/checkpoints/step-N")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        rule = f"{folder} exists and is not a run's folder (it has no {RUN_FILE})"
        yield Problem("output_dir", rule, "set run_name or output_dir to a new one")
        return
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    if resume == "never" and checkpoints:
        rule = f"{folder} holds {len(checkpoints)} checkpoints, and starting anew would overwrite them"
        yield Problem("train.resume", rule, f"set run_name={_free_name(folder)}, or remove {folder}")
    elif checkpoints or (folder / "model").exists():
        yield from _difference_problems(config, folder)


def _difference_problems(config: RunConfig, folder: Path) -> Iterator[Problem]:
    way_out = f"set run_name={_free_name(folder)} for a run of its own, or go back to the old value"
    try:
        old = read_plan(folder).config
    except RequestError as error:
        yield Problem("output_dir", error.problems[0].rule, f"set run_name={_free_name(folder)}")
        return
    for section in ("model", "task", "data", "method", "moe", "privacy", "optim", "train"):
        before, after = (_learned(getattr(c, section).model_dump()) for c in (old, config))
        for key in dict.fromkeys([*before, *after]):
            may_change = key in MAY_CHANGE.get(section, ()) and not (section == "train" and fixes_length(config, key))
            if not may_change and before.get(key) != after.get(key):
                rule = f"{folder} is a run with {before.get(key)!r}, and this one has {after.get(key)!r}"
                yield Problem(f"{section}.{key}", rule, way_out)


def _learned(section: dict[str, Any]) -> dict[str, Any]:
    """A section's values, without what the sets of a mixture are only evaluated on."""
    if not section.get("mixture"):
        return section
    sets = {
        name: {key: value for key, value in part.items() if key not in MAY_CHANGE["data"]}
        for name, part in section["mixture"].items()
    }
    return {**section, "mixture": sets}


def _free_name(folder: Path) -> str:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"


def _value(config: RunConfig, key: str) -> Any:
    section, _, rest = key.partition(".")
    return getattr(getattr(config, section), rest, None)


def _where(key: str, origins: Mapping[str, str]) -> str:
    return f"{key} ({origins[key]})" if origins.get(key) else key
