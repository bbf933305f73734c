"""Rules between keys of different groups."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from ..config.method import LoraKeys
from ..config.run import RunConfig
from ..errors import Problem
from ..pretrained.folder import is_known_dense
from .keys import value_of, where_of


def mixture_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Keys for experts where config.json tells of none; of a model that is not here yet the workers tell."""
    keys = [key for key in origins if key.startswith("moe.") and value_of(config, key) is not None]
    if keys and is_known_dense(config.model.name_or_path):
        for key in keys:
            rule = "nothing reads it: the model has no mixture of experts"
            yield Problem(where_of(key, origins), rule, "remove it, or name another model")


def length_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    train = config.train
    if train.max_steps is not None and train.num_train_epochs is not None:
        where = where_of("train.max_steps", origins)
        yield Problem(where, "train.num_train_epochs is set too, and one of them decides", "remove one of the two")
    if train.max_steps is None and train.num_train_epochs is None:
        rule = "the length of the run is not given"
        yield Problem("train", rule, "set train.max_steps or train.num_train_epochs")


def method_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """What a method cannot be combined with."""
    method = config.method
    if method.virtual_tokens and config.task.packs:
        rule = f"method={method.name} puts virtual tokens in front of each row, and a packed row has many documents"
        yield Problem(where_of("task.packing", origins), rule, "set task.packing=false, or choose another method")
    if method.virtual_tokens and not config.task.keeps_virtual_tokens:
        rule = (
            f"method={method.name} keeps nothing but its tokens, and the new head of task={config.task.name} must learn"
        )
        yield Problem(where_of("method.name", origins), rule, "choose method=lora, or another method")
    if method.virtual_tokens and config.task.name == "seq2seq":
        rule = f"method={method.name} would stand in front of what the decoder writes too, which nothing here reads"
        yield Problem(where_of("method.name", origins), rule, "choose method=lora, adapter or ia3")
    if method.name == "prefix" and config.model.gradient_checkpointing:
        rule = "the prefix reaches attention as a cache of keys and values, which recomputed blocks do not get"
        way_out = "set model.gradient_checkpointing=false, or choose method=prompt"
        yield Problem(where_of("model.gradient_checkpointing", origins), rule, way_out)
    if config.model.from_scratch and method.name != "full":
        rule = f"method={method.name} leaves weights as they were drawn at random, and those know nothing"
        yield Problem(where_of("model.from_scratch", origins), rule, "choose method=full, or set it to false")
    if config.model.add_tokens and method.name not in ("full", "lora", "qlora"):
        rule = f"method={method.name} does not train the new tokens' embeddings, so they would never mean anything"
        yield Problem(where_of("model.add_tokens", origins), rule, "choose method=lora or full, or remove it")
    if getattr(config.task, "new_head", False) and not method.whole:
        rule = f"the head shares its weights with the embeddings, which method={method.name} cannot store"
        yield Problem(where_of("task.new_head", origins), rule, "choose method=full, or a folder that has a head")
    quantization = config.model.quantization or "none"
    if method.name == "qlora" and quantization == "none":
        rule = "method=qlora is LoRA over a quantised base, and none was asked for"
        yield Problem(where_of("model.quantization", origins), rule, "set it to nf4 or int8, or choose method=lora")
    if quantization != "none" and method.name not in ("lora", "qlora"):
        rule = f"a base in {quantization} cannot learn, and method={method.name} " + (
            "trains its weights" if method.whole else "is proven over whole weights only"
        )
        yield Problem(where_of("model.quantization", origins), rule, "choose method=qlora, or set it to none")
    if quantization != "none" and getattr(method, "use_dora", False):
        rule = "DoRA needs the norms of whole weights, which a quantised base does not hold"
        yield Problem(where_of("method.use_dora", origins), rule, "set method.use_dora=false")
    if quantization != "none" and isinstance(method, LoraKeys) and method.moves_base:
        rule = f"{method.init_lora_weights} changes the base, and what it leaves would have to be quantised anew"
        yield Problem(where_of("method.init_lora_weights", origins), rule, "remove it, or set model.quantization=none")
    if method.name == "prompt" and method.prompt_tuning_init == "TEXT" and not method.prompt_tuning_init_text:
        rule = "prompt_tuning_init=TEXT starts from a text, and none is given"
        yield Problem("method.prompt_tuning_init_text", rule, "set it, or method.prompt_tuning_init=SAMPLE_VOCAB")


def token_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """What can be wrong with added tokens before the tokenizer is read."""
    counts = collections.Counter(config.model.add_tokens)
    if twice := [token for token, count in counts.items() if count > 1]:
        rule = f"{', '.join(map(repr, twice))} stands there more than once"
        yield Problem(where_of("model.add_tokens", origins), rule, "name each token once")


def reference_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Preferences are learned against the model as it starts, which must be one to stay near to."""
    if config.task.name != "preference":
        return
    if config.model.from_scratch:
        rule = "the run would be held near weights that were drawn at random, and those know nothing"
        yield Problem(where_of("model.from_scratch", origins), rule, "set it to false, and train on answers first")
    if config.method.virtual_tokens:
        rule = f"method={config.method.name} starts with virtual tokens that disturb the model, which is its reference"
        yield Problem("method.name", rule, "choose method=lora, or another that starts as the base")
