"""Which weights learn: exactly those meant."""

from __future__ import annotations

import math

import peft
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.errors import RequestError
from dist_ft.method.full import Full
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def llama() -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SIZES))


def trained(model: torch.nn.Module) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


def lora(**settings: object) -> Lora:
    return Lora(LoraConfig(name="lora", **settings))


def test_full_trains_everything() -> None:
    model = Full(FullConfig(name="full")).apply(find_anatomy(llama().requires_grad_(False)))
    assert trained(model) == {name for name, _ in model.named_parameters()}


def test_lora_trains_two_matrices_a_linear_layer_as_peft_does() -> None:
    model = lora(r=4).apply(find_anatomy(llama()))
    expected = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert trained(model) == trained(expected) and len(trained(model)) == 2 * 2 * 7


def test_named_targets_only() -> None:
    names = trained(lora(target_modules=["q_proj", "v_proj"]).apply(find_anatomy(llama())))
    assert len(names) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in names)


def test_one_regular_expression() -> None:
    names = trained(lora(target_modules=r".*layers\.1\..*q_proj").apply(find_anatomy(llama())))
    assert len(names) == 2 and all("layers.1.self_attn.q_proj" in name for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], r".*\.q_prjo", "wq"])
def test_a_pattern_that_matches_nothing_is_an_error(targets: object) -> None:
    with pytest.raises(RequestError) as caught:
        lora(target_modules=targets).apply(find_anatomy(llama()))
    assert "q_proj" in str(caught.value), "the message should show what there is"


def test_modules_to_save_are_trained_whole_and_must_exist() -> None:
    names = trained(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]).apply(find_anatomy(llama())))
    assert any("lm_head" in name for name in names)
    with pytest.raises(RequestError, match="score"):
        lora(modules_to_save=["score"]).apply(find_anatomy(llama()))


def test_all_linear_leaves_router_and_experts_of_a_mixture_alone() -> None:
    model = lora().apply(find_anatomy(MixtralForCausalLM(MixtralConfig(**SIZES, num_local_experts=4))))
    assert trained(model) and all("self_attn" in name for name in trained(model))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / math.sqrt(16))])
def test_scaling(rslora: bool, scale: float) -> None:
    model = lora(use_rslora=rslora).apply(find_anatomy(llama()))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(scale)


def test_dora_has_magnitudes_and_starts_at_the_base_model() -> None:
    ids = torch.arange(1, 9)[None]
    base = llama()
    expected = base(input_ids=ids).logits
    model = lora(use_dora=True).apply(find_anatomy(base))
    assert sum("magnitude" in name for name in trained(model)) == 14
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)
