"""Blocks, linear layers and routers are found from modules."""

from __future__ import annotations

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForCausalLM,
    DeepseekV3Config,
    LlamaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
    T5Config,
)

from dist_ft.model.anatomy import find_anatomy

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 97,
}


def build(config: object, auto: type = AutoModelForCausalLM) -> torch.nn.Module:
    with torch.device("meta"):
        return auto.from_config(config)


def test_blocks_of_a_decoder_are_its_layers() -> None:
    model = build(LlamaConfig(**SIZES))
    anatomy = find_anatomy(model)
    assert anatomy.parts(anatomy.blocks) == list(model.model.layers)


def test_blocks_of_an_encoder_decoder_are_those_of_both() -> None:
    model = build(T5Config(d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=97), AutoModel)
    anatomy = find_anatomy(model)
    assert anatomy.parts(anatomy.blocks) == [*model.encoder.block, *model.decoder.block]


def test_linears_are_those_of_the_blocks_without_the_head() -> None:
    names = find_anatomy(build(LlamaConfig(**SIZES))).linears
    assert len(names) == 3 * 7 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize(
    "config",
    [
        MixtralConfig(**SIZES, num_local_experts=4),
        Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16),
        DeepseekV3Config(
            **(SIZES | {"num_key_value_heads": 4}), n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1,
            moe_intermediate_size=16, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=4,
            qk_nope_head_dim=4, v_head_dim=8,
        ),
    ],
    ids=lambda config: config.model_type,
)  # fmt: skip
def test_no_router_is_a_target(config: object) -> None:
    linears = find_anatomy(build(config)).linears
    assert linears and not any(name.rsplit(".", 1)[-1] in ("gate", "router") for name in linears)


def test_a_router_that_is_a_linear_layer_is_found() -> None:
    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = torch.nn.Linear(8, 4, bias=False)
            self.experts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(4))

    class Model(torch.nn.Module):
        config = type("Config", (), {"num_experts": 4})()

        def __init__(self) -> None:
            super().__init__()
            self.layers = torch.nn.ModuleList(Mixture() for _ in range(2))

    model = Model()
    anatomy = find_anatomy(model)
    assert anatomy.parts(m.router for m in anatomy.mixtures) == [layer.gate for layer in model.layers]
    assert len(anatomy.linears) == 8 and anatomy.parts(anatomy.blocks) == list(model.layers)
