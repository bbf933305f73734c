"""Bottleneck adapters: where they stand, what they compute, and that a saved one comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf
from torch import nn

from dist_ft.config.method import AdapterConfig
from dist_ft.errors import RequestError
from dist_ft.method.adapter import Adapter, load_adapter
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.sublayers import find_sublayer_ends

IDS = torch.arange(1, 9)[None]


def llama() -> nn.Module:
    return hf.LlamaForCausalLM(
        hf.LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )


def qwen3() -> nn.Module:
    return hf.Qwen3ForCausalLM(
        hf.Qwen3Config(
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            vocab_size=97,
        )
    )


def gpt2() -> nn.Module:
    return hf.GPT2LMHeadModel(hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=97, n_positions=64))


def opt() -> nn.Module:
    return hf.OPTForCausalLM(
        hf.OPTConfig(
            hidden_size=32,
            ffn_dim=48,
            num_hidden_layers=2,
            num_attention_heads=4,
            vocab_size=97,
            max_position_embeddings=64,
            word_embed_proj_dim=32,
        )
    )


def bloom() -> nn.Module:
    return hf.BloomForCausalLM(hf.BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=97))


def bert() -> nn.Module:
    return hf.BertForMaskedLM(
        hf.BertConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=97)
    )


def t5() -> nn.Module:
    return hf.T5ForConditionalGeneration(
        hf.T5Config(d_model=32, d_ff=48, d_kv=8, num_layers=2, num_heads=4, vocab_size=97, decoder_start_token_id=0)
    )


def t5_gated() -> nn.Module:
    model = t5()
    model.config.feed_forward_proj = "gated-gelu"
    return hf.T5ForConditionalGeneration(hf.T5Config(**{**model.config.to_dict(), "is_gated_act": True}))


T5 = (
    ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"],
    ["layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"],  # of the encoder, of the decoder
)
PLACES: dict[Any, tuple[list[str], list[str]]] = {  # of one block: behind attention, behind the MLP
    llama: (["self_attn.o_proj"], ["mlp.down_proj"]),
    qwen3: (["self_attn.o_proj"], ["mlp.down_proj"]),
    gpt2: (["attn.c_proj"], ["mlp.c_proj"]),
    opt: (["self_attn.out_proj"], ["fc2"]),
    bloom: (["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    bert: (["attention.output.dense"], ["output.dense"]),
    t5: T5,
    t5_gated: T5,
}
COUNTS = {t5: (6, 4), t5_gated: (6, 4)}  # an encoder block has one attention, a decoder block two


def build(make: Any) -> Any:
    torch.manual_seed(0)
    return make().eval()


def adapter(**settings: Any) -> Adapter:
    return Adapter(AdapterConfig(name="adapter", **{"reduction_factor": 4, **settings}))


def logits_of(model: nn.Module) -> torch.Tensor:
    inputs = {"decoder_input_ids": IDS} if model.config.is_encoder_decoder else {}  # type: ignore[union-attr]
    with torch.no_grad():
        return model(input_ids=IDS, **inputs).logits


def shake(model: nn.Module) -> None:
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("make", PLACES)
@pytest.mark.parametrize("configuration", ["houlsby", "pfeiffer"])
def test_stands_behind_the_sublayers_and_changes_nothing_at_first(make: Any, configuration: str) -> None:
    model = build(make)
    expected, names = logits_of(model), set(dict(model.named_parameters()))
    adapted = adapter(configuration=configuration).apply(find_anatomy(model))
    assert torch.equal(logits_of(adapted), expected)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert set(dict(adapted.named_parameters())) - learning == names, "the model's own names stay"
    attention, mlp = PLACES[make]
    places = [*mlp, *(attention if configuration == "houlsby" else [])]
    layers = {name.split(".adapter.")[0] for name in learning}
    attentions, mlps = COUNTS.get(make, (2, 2))
    assert len(layers) == mlps + (attentions if configuration == "houlsby" else 0)
    assert all(any(layer.endswith("." + place) for place in places) for layer in layers)
    assert len(learning) == 4 * len(layers)
    shake(adapted)
    assert not torch.allclose(logits_of(adapted), expected, atol=1e-4), "every adapter is called"


def test_computes_what_the_papers_say() -> None:
    """By hand on the input and output of one layer: h + W_up f(W_down h + b) + b."""
    model = adapter(configuration="houlsby", non_linearity="gelu").apply(find_anatomy(build(llama)))
    shake(model)
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 5, 32)
    h = x @ layer.weight.T
    inner = torch.nn.functional.gelu(h @ layer.adapter.down.weight.T + layer.adapter.down.bias)
    assert inner.shape[-1] == 32 // 4
    expected = h + inner @ layer.adapter.up.weight.T + layer.adapter.up.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("make", PLACES)
def test_a_saved_one_comes_back_in_three_lines(make: Any, tmp_path: Path) -> None:
    method = adapter(configuration="houlsby", non_linearity="silu")
    model = method.apply(find_anatomy(build(make)))
    shake(model)
    method.export(model, ((n, p) for n, p in model.named_parameters() if p.requires_grad), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["adapter_type"] == "bottleneck" and settings["reduction_factor"] == 4
    loaded = load_adapter(build(make), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".adapter." in n)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    method = adapter()
    model = method.apply(find_anatomy(build(llama)))
    method.export(model, ((n, p) for n, p in model.named_parameters() if p.requires_grad), tmp_path)
    with pytest.raises(RequestError, match="other tensors than this model needs"):
        load_adapter(build(gpt2), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(RequestError, match="not hold a bottleneck"):
        load_adapter(build(llama), tmp_path)


def test_experts_are_refused() -> None:
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    model = hf.MixtralForCausalLM(hf.MixtralConfig(**sizes, num_key_value_heads=2, vocab_size=97, num_local_experts=4))
    assert find_sublayer_ends(find_anatomy(model)) == []
    with pytest.raises(RequestError, match="method=lora"):
        adapter().apply(find_anatomy(model))


def test_a_base_in_half_precision_takes_an_adapter_in_float32() -> None:
    model = adapter().apply(find_anatomy(build(llama).to(torch.bfloat16)))
    assert logits_of(model).dtype == torch.bfloat16
