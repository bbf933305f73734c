"""Mixtures of experts are found from their modules and shapes, in every architecture, under every wrapper."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    MixtralConfig,
    OlmoeConfig,
    Qwen3MoeConfig,
)

from dist_ft.model.structure import find_linears, find_mixtures

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "vocab_size": 97,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **(SIZES | {"num_key_value_heads": 4, "head_dim": 4}), n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip


def build(name: str) -> Any:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIGS[name], attn_implementation="eager")


class Separate(nn.Module):
    """Experts as modules of their own, each called only where a token chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_and_experts_are_found(name: str) -> None:
    model = build(name)
    found = find_mixtures(model)
    layers = [1, 2] if name == "deepseek_v3" else [0, 1, 2]
    assert [m.layer for m in found] == layers
    for mixture in found:
        mlp = model.model.layers[mixture.layer].mlp
        assert mixture.module is mlp and mixture.experts is mlp.experts and mixture.fused and mixture.num_experts == 4
        assert mixture.router is (mlp.router if name == "gpt_oss" else mlp.gate)
        assert model.get_submodule(mixture.router_name) is mixture.router
        assert model.get_submodule(mixture.experts_name) is mixture.experts
    endings = {linear.rsplit(".", 1)[-1] for linear in find_linears(model)}
    assert not endings & {"gate", "router", "experts", "lm_head"}
    if name == "deepseek_v3":
        assert any("shared_experts" in linear for linear in find_linears(model))


def test_separate_experts_are_found() -> None:
    model = nn.Sequential(nn.ModuleList(Separate(8, 4) for _ in range(2)))
    assert [(m.layer, m.num_experts, m.fused) for m in find_mixtures(model)] == [(0, 4, False), (1, 4, False)]


def test_a_dense_model_has_none_and_a_convolution_is_no_expert() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(8, 8, 4, groups=1)
            self.dt_proj = nn.Linear(4, 8)

    assert find_mixtures(nn.Sequential(nn.ModuleList([Mixer()]))) == []
    assert find_mixtures(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))) == []
