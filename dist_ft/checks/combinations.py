"""Checks of keys that depend on keys of other groups."""

from __future__ import annotations

import collections
from collections.abc import Iterator, Mapping

from ..config.method import LoraKeys
from ..config.run import RunConfig
from ..errors import Problem
from ..pretrained.folder import is_known_dense
from .keys import value_of, where_of


def mixture_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Reject `moe.*` keys for a local model without experts; the workers check models that are not local yet."""
    keys = [key for key in origins if key.startswith("moe.") and value_of(config, key) is not None]
    if keys and is_known_dense(config.model.name_or_path):
        for key in keys:
            rule = "has no effect: the model has no experts"
            yield Problem(
                where_of(key, origins), rule, "remove it, or set model.name_or_path to a mixture-of-experts model"
            )


def length_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Check that exactly one of `train.max_steps` and `train.num_train_epochs` is set."""
    train = config.train
    if train.max_steps is not None and train.num_train_epochs is not None:
        where = where_of("train.max_steps", origins)
        yield Problem(
            where,
            "train.num_train_epochs is also set, but only one can be used",
            "remove train.max_steps or train.num_train_epochs",
        )
    if train.max_steps is None and train.num_train_epochs is None:
        rule = "the length of the run is not set"
        yield Problem("train", rule, "set train.max_steps or train.num_train_epochs")


def method_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Reject combinations that the method does not support."""
    method = config.method
    if method.virtual_tokens and config.task.packs:
        rule = f"method={method.name} prepends virtual tokens to each row, but a packed sample contains several rows"
        yield Problem(where_of("task.packing", origins), rule, "set task.packing=false, or use another method")
    if method.virtual_tokens and not config.task.keeps_virtual_tokens:
        rule = f"method={method.name} saves only its virtual tokens, but task={config.task.name} also trains a new head"
        yield Problem(
            where_of("method.name", origins), rule, "set method=lora or another method without virtual tokens"
        )
    if method.virtual_tokens and config.task.name == "seq2seq":
        rule = f"method={method.name} would also prepend virtual tokens to the decoder output, which is not supported"
        yield Problem(where_of("method.name", origins), rule, "set method=lora, adapter or ia3")
    if method.name == "prefix" and config.model.gradient_checkpointing:
        rule = "method=prefix passes the prefix as a key-value cache, which recomputed blocks do not receive"
        way_out = "set model.gradient_checkpointing=false, or set method=prompt"
        yield Problem(where_of("model.gradient_checkpointing", origins), rule, way_out)
    if config.model.from_scratch and method.name != "full":
        rule = f"method={method.name} would leave frozen weights at their random initialization"
        yield Problem(where_of("model.from_scratch", origins), rule, "set method=full or model.from_scratch=false")
    if config.model.add_tokens and method.name not in ("full", "lora", "qlora"):
        rule = f"method={method.name} does not train the embeddings of the added tokens"
        yield Problem(where_of("model.add_tokens", origins), rule, "set method=lora, qlora or full, or remove it")
    if getattr(config.task, "new_head", False) and not method.whole:
        rule = f"the head shares its weights with the embeddings, which method={method.name} cannot save"
        yield Problem(where_of("task.new_head", origins), rule, "set method=full, or use a model that has a head")
    quantization = config.model.quantization or "none"
    if method.name == "qlora" and quantization == "none":
        rule = "method=qlora requires a quantized base model, but the quantization is none"
        yield Problem(
            where_of("model.quantization", origins), rule, "set model.quantization=nf4 or int8, or set method=lora"
        )
    if quantization != "none" and method.name not in ("lora", "qlora"):
        rule = f"{quantization} weights cannot be trained, and method={method.name} " + (
            "trains the base model" if method.whole else "is only supported on unquantized weights"
        )
        yield Problem(where_of("model.quantization", origins), rule, "set method=qlora or model.quantization=none")
    if quantization != "none" and getattr(method, "use_dora", False):
        rule = "DoRA needs the norms of the unquantized weights, which a quantized base model does not hold"
        yield Problem(where_of("method.use_dora", origins), rule, "set method.use_dora=false")
    if quantization != "none" and isinstance(method, LoraKeys) and method.moves_base:
        rule = f"{method.init_lora_weights} changes the base weights, which would have to be quantized again"
        yield Problem(where_of("method.init_lora_weights", origins), rule, "remove it, or set model.quantization=none")
    if method.name == "prompt" and method.prompt_tuning_init == "TEXT" and not method.prompt_tuning_init_text:
        rule = "method.prompt_tuning_init=TEXT requires a text"
        yield Problem(
            "method.prompt_tuning_init_text", rule, "set this key, or set method.prompt_tuning_init=SAMPLE_VOCAB"
        )


def token_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Check added tokens as far as possible without the tokenizer."""
    counts = collections.Counter(config.model.add_tokens)
    if twice := [token for token, count in counts.items() if count > 1]:
        rule = f"{', '.join(map(repr, twice))} is listed more than once"
        yield Problem(where_of("model.add_tokens", origins), rule, "list each token once")


def reference_problems(config: RunConfig, origins: Mapping[str, str]) -> Iterator[Problem]:
    """Check that the initial model can serve as the reference model of `task=preference`."""
    if config.task.name != "preference":
        return
    if config.model.from_scratch:
        rule = "the initial model is the reference model, and its weights would be random"
        yield Problem(
            where_of("model.from_scratch", origins),
            rule,
            "set model.from_scratch=false, and fine-tune on answers first",
        )
    if config.method.virtual_tokens:
        rule = f"virtual tokens of method={config.method.name} change the initial model, which is the reference model"
        yield Problem(
            "method.name", rule, "set method=lora or another method that starts from the unchanged base model"
        )
