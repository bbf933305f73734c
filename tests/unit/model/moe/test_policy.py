"""Routers learn only where asked, and keys for experts are of models that have some."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.config.moe import MoeConfig
from dist_ft.errors import RequestError
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.moe.policy import apply_policy, check_keys, resolve_aux_loss_coef, route_method
from dist_ft.model.reach import lies_in
from dist_ft.testing.tiny import MIXTURES, build
from tests.samples import apply_method


@pytest.mark.parametrize(
    ("name", "policy"),
    [pair for pair in itertools.product(MIXTURES, ["frozen", "train", "adapt"]) if pair != ("deepseek_v3", "train")],
)
def test_lora_leaves_routers_alone_unless_asked(name: str, policy: Any) -> None:
    model = build(name)
    config = LoraConfig(name="lora", r=2)  # type: ignore[call-arg]
    anatomy = find_anatomy(model)
    mixtures = anatomy.mixtures
    routed = route_method(config, MoeConfig(router=policy), anatomy)  # type: ignore[call-arg]
    Lora(routed).apply(anatomy)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    of_routers = {key for key in trained if any(key.startswith(m.router + ".") for m in mixtures)}
    assert trained - of_routers, "attention"
    assert not any(lies_in(key, m.experts) for key in trained for m in mixtures), "experts are not linear"
    if policy == "frozen":
        assert not of_routers
    else:
        assert len(of_routers) >= len(mixtures) and all(("lora_" in key) == (policy == "adapt") for key in of_routers)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_names_that_peft_takes_for_experts_are_refused() -> None:
    config = LoraConfig(name="lora", target_modules=["q_a_proj", "gate_proj", "up_proj"])  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="fused gate_up_proj"):
        Lora(config).apply(find_anatomy(build("deepseek_v3")))


@pytest.mark.parametrize("key", ["target_parameters", "modules_to_save"])
def test_a_frozen_router_that_is_a_target_is_a_contradiction(key: str) -> None:
    name = "mlp.gate.weight" if key == "target_parameters" else "gate"
    config = LoraConfig(name="lora", **{key: [name]})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="is frozen, but"):
        apply_policy(MoeConfig(), config, apply_method(Lora(config), build("qwen3_moe")).anatomy)  # type: ignore[call-arg]


def test_target_parameters_must_match_and_take_no_dropout() -> None:
    config = LoraConfig(name="lora", target_parameters=["mlp.experts.w1"], lora_dropout=0.1)  # type: ignore[call-arg]
    with pytest.raises(RequestError) as error:
        Lora(config).apply(find_anatomy(build("mixtral")))
    assert {p.where for p in error.value.problems} == {"method.target_parameters", "method.lora_dropout"}
    assert "mlp.experts.gate_up_proj" in str(error.value)


def test_keys_of_a_dense_model_are_refused() -> None:
    dense = find_anatomy(build("llama"))
    check_keys(MoeConfig(), [], dense)  # type: ignore[call-arg]
    check_keys(MoeConfig(router="train"), ["moe.router"], find_anatomy(build("mixtral")))  # type: ignore[call-arg]
    for config, keys in ((MoeConfig(z_loss_coef=0.1), []), (MoeConfig(), ["moe.z_loss_coef"])):  # type: ignore[call-arg]
        with pytest.raises(RequestError, match="no mixture of experts"):
            check_keys(config, keys, dense)


def test_the_models_own_coefficient_counts_where_routers_learn() -> None:
    model, lora, full = build("mixtral"), LoraConfig(name="lora"), FullConfig(name="full")  # type: ignore[call-arg]
    anatomy = find_anatomy(model)
    assert resolve_aux_loss_coef(MoeConfig(), full, anatomy) == model.config.router_aux_loss_coef > 0  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(), lora, anatomy) == 0  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(aux_loss_coef=0.5), lora, anatomy) == 0.5  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(), full, find_anatomy(build("deepseek_v3"))) == 0  # type: ignore[call-arg]
