"""Tests that mixture-of-experts models are exported, reloaded and merged correctly for all trained parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.config.moe import MoeConfig
from dist_ft.errors import RequestError
from dist_ft.export.merge import merge
from dist_ft.export.probe import compare, probe_model
from dist_ft.export.write import export_run
from dist_ft.method.full import Full
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.moe.policy import route_method
from dist_ft.testing import tiny
from tests.exports import TOKENS, Case
from tests.samples import given, on_meta

EXPERTS = {"target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]}
VARIANTS: dict[str, tuple[dict[str, Any] | None, Any]] = {
    "full": (None, "train"),
    "attention": ({}, "frozen"),
    "experts": (EXPERTS, "frozen"),
    "router-adapted": (EXPERTS, "adapt"),
    "router-trained": ({}, "train"),
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_what_learned_is_there_after_loading(name: str, variant: str, tmp_path: Path) -> None:
    base = tiny.build(name)
    dice = torch.Generator().manual_seed(3)
    for buffer_name, buffer in base.named_buffers():
        if buffer_name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape, generator=dice))
    base.save_pretrained(tmp_path / "base")
    options, router = VARIANTS[variant]
    if (name, variant) == ("deepseek_v3", "router-trained"):
        with pytest.raises(RequestError, match="has buffers, which peft does not save"):
            route_method(LoraConfig(name="lora"), MoeConfig(router=router), find_anatomy(base))  # type: ignore[call-arg]
        return
    method: Any = Full(FullConfig(name="full"))
    if options is not None:
        config = LoraConfig(name="lora", r=2, **options)
        method = Lora(route_method(config, MoeConfig(router=router), find_anatomy(base)))  # type: ignore[call-arg,arg-type]
    case = Case(tmp_path / "base", tmp_path / "model", method)
    probe = probe_model(case.model, given(TOKENS))
    deviation = export_run(
        method=method, model_config=case.config, model_dir=str(case.folder), bare=on_meta(case.build), tokenizer=None,
        end_token_id=2, weights=case.weights(), out=case.out, card="# card\n", probe=probe,
    )  # fmt: skip
    assert deviation is not None and deviation.relative < 1e-5
    if options is not None:
        assert compare(probe, probe_model(merge(case.model), given(TOKENS))).relative < 1e-4
