"""Tests of the table of synonyms against the libraries that define the names, and against our own schema."""

from __future__ import annotations

import dataclasses

import pytest
from peft import LoraConfig
from transformers import TrainingArguments
from trl import DPOConfig, SFTConfig

from dist_ft.config.run import RunConfig
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.composition.keys import members, unknown_key
from dist_ft.launch.composition.synonyms import AXOLOTL, LLAMA_FACTORY, PEFT, REASONS, SYNONYMS, TRANSFORMERS, TRL

KEYS = {
    f"{section}.{key}"
    for section, field in RunConfig.model_fields.items()
    for record in members(field.annotation)
    for key in record.model_fields
}


def fields_of(*kinds: type) -> set[str]:
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def test_names_are_those_of_the_libraries() -> None:
    assert set(TRANSFORMERS) <= fields_of(TrainingArguments)
    assert set(TRL) <= fields_of(SFTConfig, DPOConfig)
    assert set(PEFT) <= fields_of(LoraConfig)


def test_synonyms_lead_to_keys_and_have_one_meaning() -> None:
    assert set(SYNONYMS.values()) <= KEYS
    assert not SYNONYMS.keys() & REASONS.keys()
    assert len(SYNONYMS) == sum(map(len, (TRANSFORMERS, TRL, PEFT, AXOLOTL, LLAMA_FACTORY)))
    assert len(SYNONYMS) + len(REASONS) > 100


@pytest.mark.parametrize("name", [*TRANSFORMERS, *TRL, *PEFT, *AXOLOTL, *LLAMA_FACTORY])
def test_a_name_of_another_library_leads_to_ours(name: str) -> None:
    way_out = unknown_key(f"engine.{name}", {}, name).way_out
    assert way_out.startswith(f"did you mean {SYNONYMS[name]}?")


@pytest.mark.parametrize(
    ("key", "way_out"),
    [
        ("optim.lr", "did you mean optim.learning_rate?"),
        ("train.lr", "did you mean optim.learning_rate?"),
        ("lr", "did you mean optim.learning_rate?"),
        ("method.lora_r", "did you mean method.r?"),
        ("train.learning_rate", "did you mean optim.learning_rate?"),
        ("beta", "did you mean task.beta? It belongs to task=preference"),
        ("method.num_layrs", "did you mean method.num_layers? It belongs to method=freeze"),
        ("train.max_step", "did you mean train.max_steps?"),
        ("enigne.dtype", "did you mean model.dtype?"),
        ("train.bf16", "set model.dtype=bfloat16 or float32"),
    ],
)
def test_hints(key: str, way_out: str) -> None:
    config = compose([]).config.model_dump()
    assert unknown_key(key, config, key).way_out == way_out


@pytest.mark.parametrize("key", ["train.lx", "optim.foo", "method.lora_x", "model.size", "xyz"])
def test_names_that_are_not_similar_get_no_hint(key: str) -> None:
    found = unknown_key(key, compose([]).config.model_dump(), key)
    assert found.way_out.startswith("valid keys: ")
