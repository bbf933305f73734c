"""LoRA's settings do what peft's do, and one that matches nothing is an error."""

from __future__ import annotations

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
from tests.unit.method.test_methods import llama, lora, trained

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 9)[None]


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
    assert len(expected) == len(trained(model)) and len(set(expected.values())) == 2
