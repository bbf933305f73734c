"""Weight decay applies to matrices, and not to parameters that scale or shift single features."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from transformers import Trainer

from dist_ft.config.method import MethodConfig
from dist_ft.config.optim import OptimConfig
from dist_ft.families import method_of
from dist_ft.model.anatomy import find_anatomy
from dist_ft.optim.adamw import build_adamw
from dist_ft.testing import tiny


def decayed(settings: dict[str, Any]) -> tuple[set[str], set[str], Any]:
    """Names of the parameters that a step with zero gradients decays, names of all trainable ones, and the model."""
    config = TypeAdapter(MethodConfig).validate_python(settings)
    model = method_of(config).apply(find_anatomy(tiny.build("llama")))
    learned = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for parameter in learned.values():
        parameter.data.fill_(1.0)
        parameter.grad = torch.zeros_like(parameter)
    build_adamw(OptimConfig(learning_rate=0.1, weight_decay=0.5), learned.items()).step()
    shrunk = {name for name, p in learned.items() if not torch.equal(p.data, torch.ones_like(p))}
    return shrunk, set(learned), model


@pytest.mark.parametrize("settings", [{"name": "ia3"}, {"name": "ln_tuning"}, {"name": "lora", "r": 1}], ids=str)
def test_nothing_of_single_features_decays(settings: dict[str, Any]) -> None:
    shrunk, learned, _ = decayed(settings)
    assert learned and not shrunk


def test_of_a_whole_model_decays_what_transformers_would() -> None:
    shrunk, learned, model = decayed({"name": "full"})
    assert shrunk == set(Trainer.get_decay_parameter_names(None, model)) < learned  # type: ignore[arg-type]


def test_low_rank_matrices_decay_and_magnitudes_do_not() -> None:
    shrunk, learned, _ = decayed({"name": "lora", "r": 2, "use_dora": True})
    assert {name for name in learned if "magnitude" in name} == learned - shrunk and shrunk
