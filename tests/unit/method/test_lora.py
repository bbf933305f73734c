"""LoRA trains what peft would, its settings mean what peft's do, and one that matches nothing is an error."""

from __future__ import annotations

import math
from functools import partial
from typing import Any

import peft
import pytest
import torch
from peft.optimizers import create_loraplus_optimizer

from dist_ft.config.method import LoraConfig
from dist_ft.config.optim import OptimConfig
from dist_ft.errors import RequestError
from dist_ft.model.anatomy import find_anatomy
from dist_ft.optim.adamw import build_adamw
from dist_ft.testing import tiny
from tests.samples import lora, trainable_names

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 9)[None]
llama = partial(tiny.build, "llama")


def test_lora_trains_two_matrices_a_linear_layer_as_peft_does() -> None:
    model = lora(r=4).apply(find_anatomy(llama()))
    expected = peft.get_peft_model(llama(), peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear"))
    assert trainable_names(model) == trainable_names(expected) and len(trainable_names(model)) == 2 * 2 * 7


def test_named_targets_only() -> None:
    names = trainable_names(lora(target_modules=["q_proj", "v_proj"]).apply(find_anatomy(llama())))
    assert len(names) == 2 * 2 * 2 and all("q_proj" in name or "v_proj" in name for name in names)


def test_one_regular_expression() -> None:
    names = trainable_names(lora(target_modules=r".*layers\.1\..*q_proj").apply(find_anatomy(llama())))
    assert len(names) == 2 and all("layers.1.self_attn.q_proj" in name for name in names)


@pytest.mark.parametrize("targets", [["q_proj", "qproj"], r".*\.q_prjo", "wq"])
def test_a_pattern_that_matches_nothing_is_an_error(targets: object) -> None:
    with pytest.raises(RequestError) as caught:
        lora(target_modules=targets).apply(find_anatomy(llama()))
    assert "q_proj" in str(caught.value), "the message should show what there is"


def test_modules_to_save_are_trained_whole_and_must_exist() -> None:
    names = trainable_names(lora(target_modules=["q_proj"], modules_to_save=["lm_head"]).apply(find_anatomy(llama())))
    assert any("lm_head" in name for name in names)
    with pytest.raises(RequestError, match="score"):
        lora(modules_to_save=["score"]).apply(find_anatomy(llama()))


def test_all_linear_leaves_router_and_experts_of_a_mixture_alone() -> None:
    model = lora().apply(find_anatomy(tiny.build("mixtral")))
    assert trainable_names(model) and all("self_attn" in name for name in trainable_names(model))


@pytest.mark.parametrize(("rslora", "scale"), [(False, 32 / 16), (True, 32 / math.sqrt(16))])
def test_scaling(rslora: bool, scale: float) -> None:
    model = lora(use_rslora=rslora).apply(find_anatomy(llama()))
    assert model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] == pytest.approx(scale)


def test_dora_has_magnitudes_and_starts_at_the_base_model() -> None:
    ids = torch.arange(1, 9)[None]
    base = llama()
    expected = base(input_ids=ids).logits
    model = lora(use_dora=True).apply(find_anatomy(base))
    assert sum("magnitude" in name for name in trainable_names(model)) == 14
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "settings",
    [
        {"rank_pattern": {"q_proj": 2, r"layers\.1\.mlp\.up_proj": 6}, "alpha_pattern": {"q_proj": 5}},
        {"layers_to_transform": [1]},
        {"exclude_modules": ["up_proj", "down_proj"]},
        {"exclude_modules": r".*layers\.0\..*"},
        {"init_lora_weights": "gaussian"},
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_settings_mean_what_they_mean_to_peft(settings: dict[str, Any]) -> None:
    config = peft.LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=32, target_modules=LINEARS, **settings)
    torch.manual_seed(3)
    base, other = llama(), llama()
    torch.manual_seed(3)
    model = lora(r=4, **settings).apply(find_anatomy(base))
    torch.manual_seed(3)
    expected = peft.get_peft_model(other, config)
    one, two = ({name: p.detach() for name, p in m.named_parameters() if p.requires_grad} for m in (model, expected))
    assert one.keys() == two.keys() and one
    assert all(torch.equal(one[name], two[name]) for name in one)
    torch.testing.assert_close(model(input_ids=IDS).logits, llama()(input_ids=IDS).logits)
    for parameter in [*one.values(), *two.values()]:
        parameter.add_(0.1)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"rank_pattern": {"qproj": 2}}, "rank_pattern.*qproj"),
        ({"alpha_pattern": {"lm_head": 2}}, "alpha_pattern.*lm_head"),
        ({"layers_to_transform": [2]}, "layers 0 to 1"),
        ({"layers_to_transform": []}, "layers 0 to 1"),
        ({"layers_to_transform": [1], "target_modules": ".*q_proj"}, "says itself which layers"),
        ({"exclude_modules": ["upproj"]}, "upproj"),
        ({"exclude_modules": ".*upproj"}, "upproj"),
        ({"init_lora_weights": "orthogonal", "r": 3}, "even ranks"),
    ],
)
def test_a_setting_that_matches_nothing_is_an_error(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(RequestError, match=said):
        lora(**settings).apply(find_anatomy(llama()))


def test_lora_plus_groups_are_those_of_peft() -> None:
    config = LoraConfig(name="lora", r=4, loraplus_lr_ratio=16)
    model = lora(r=4, loraplus_lr_ratio=16).apply(find_anatomy(llama()))
    ours = build_adamw(
        OptimConfig(learning_rate=1e-3),
        [(n, p) for n, p in model.named_parameters() if p.requires_grad],
        config.lr_scale,
    )
    theirs = create_loraplus_optimizer(model, torch.optim.AdamW, lr=1e-3, loraplus_lr_ratio=16)

    def rates(groups: list[dict[str, Any]], rate: Any) -> dict[int, float]:
        return {id(p): rate(group) for group in groups for p in group["params"]}

    expected = rates(theirs.param_groups, lambda group: group["lr"])
    assert rates(ours.param_groups, lambda group: 1e-3 * group["lr_scale"]) == pytest.approx(expected)
    assert len(expected) == len(trainable_names(model)) and len(set(expected.values())) == 2
