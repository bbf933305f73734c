"""Every rank has what rank 0 reads: the same modules, dtypes and configuration, without weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, Ernie4_5_MoeConfig

from dist_ft.config.model import ModelConfig
from dist_ft.model.attention.choice import AttentionChoice
from dist_ft.model.load import load_model
from dist_ft.state import CAUSAL_LM, Architecture
from dist_ft.testing import tiny

EAGER = AttentionChoice("eager", "eager", False, "for a test")


def outline(model: Any) -> list[tuple[Any, ...]]:
    return [(n, type(m).__name__) for n, m in model.named_modules()] + [
        (n, tensor.shape, tensor.dtype) for n, tensor in [*model.named_parameters(), *model.named_buffers()]
    ]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_ranks_without_weights_have_the_dtypes_of_rank_0(name: str, dtype: str, tmp_path: Path) -> None:
    folder = tiny.save(name, tmp_path / "model")
    architecture = Architecture(auto_class=tiny.ARCHITECTURES[name][1])

    def load(*, weights: bool, from_scratch: bool = False) -> Any:
        config = ModelConfig(name_or_path=folder, dtype=dtype, from_scratch=from_scratch)
        return load_model(config, folder, EAGER, architecture, weights=weights).model

    read = outline(load(weights=True))
    assert outline(load(weights=False)) == read
    assert outline(load(weights=True, from_scratch=True)) == read
    if name == "deepseek_v3":  # whose routers want a buffer in float32
        assert {entry[-1] for entry in read if str(entry[0]).endswith("e_score_correction_bias")} == {torch.float32}


def test_parameters_that_a_class_wants_in_float32_are_so_on_every_rank(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = Ernie4_5_MoeConfig(**tiny.NARROW, moe_num_experts=4, moe_k=2, moe_intermediate_size=8)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    model = ModelConfig(name_or_path=str(tmp_path), dtype="bfloat16")
    full, empty = (
        load_model(model, str(tmp_path), EAGER, CAUSAL_LM, weights=weights).model for weights in (True, False)
    )
    assert outline(full) == outline(empty)
    assert {p.dtype for n, p in empty.named_parameters() if n.endswith("gate.weight")} == {torch.float32}
