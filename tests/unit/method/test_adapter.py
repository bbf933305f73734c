"""Bottleneck adapters: where they stand, what they compute, and that a saved one comes back."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from dist_ft.config.method import AdapterConfig
from dist_ft.errors import RequestError
from dist_ft.method.adapter import Adapter, load_adapter
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.sublayers import find_sublayer_ends
from dist_ft.testing import tiny

IDS = torch.arange(1, 9)[None]


T5 = (
    ["layer.0.SelfAttention.o", "layer.1.EncDecAttention.o"],
    ["layer.1.DenseReluDense.wo", "layer.2.DenseReluDense.wo"],  # of the encoder, of the decoder
)
PLACES: dict[str, tuple[list[str], list[str]]] = {  # of one block: behind attention, behind the MLP
    "llama": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "qwen3": (["self_attn.o_proj"], ["mlp.down_proj"]),
    "gpt2": (["attn.c_proj"], ["mlp.c_proj"]),
    "opt": (["self_attn.out_proj"], ["fc2"]),
    "bloom": (["self_attention.dense"], ["mlp.dense_4h_to_h"]),
    "bert": (["attention.output.dense"], ["output.dense"]),
    "t5": T5,
    "t5_gated": T5,
}
COUNTS = {"t5": (6, 4), "t5_gated": (6, 4)}  # an encoder block has one attention, a decoder block two


def build(name: str) -> Any:
    if name == "t5_gated":
        return tiny.build("t5", feed_forward_proj="gated-gelu").eval()
    return tiny.build(name).eval()


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


@pytest.mark.parametrize("name", PLACES)
@pytest.mark.parametrize("configuration", ["houlsby", "pfeiffer"])
def test_stands_behind_the_sublayers_and_changes_nothing_at_first(name: str, configuration: str) -> None:
    model = build(name)
    expected, own = logits_of(model), set(dict(model.named_parameters()))
    adapted = adapter(configuration=configuration).apply(find_anatomy(model))
    assert torch.equal(logits_of(adapted), expected)
    learning = {name for name, p in adapted.named_parameters() if p.requires_grad}
    assert set(dict(adapted.named_parameters())) - learning == own, "the model's own names stay"
    attention, mlp = PLACES[name]
    places = [*mlp, *(attention if configuration == "houlsby" else [])]
    layers = {name.split(".adapter.")[0] for name in learning}
    attentions, mlps = COUNTS.get(name, (2, 2))
    assert len(layers) == mlps + (attentions if configuration == "houlsby" else 0)
    assert all(any(layer.endswith("." + place) for place in places) for layer in layers)
    assert len(learning) == 4 * len(layers)
    shake(adapted)
    assert not torch.allclose(logits_of(adapted), expected, atol=1e-4), "every adapter is called"


def test_computes_what_the_papers_say() -> None:
    """By hand on the input and output of one layer: h + W_up f(W_down h + b) + b."""
    model = adapter(configuration="houlsby", non_linearity="gelu").apply(find_anatomy(build("llama")))
    shake(model)
    layer = model.model.layers[0].self_attn.o_proj
    x = torch.randn(1, 5, 32)
    h = x @ layer.weight.T
    inner = torch.nn.functional.gelu(h @ layer.adapter.down.weight.T + layer.adapter.down.bias)
    assert inner.shape[-1] == 32 // 4
    expected = h + inner @ layer.adapter.up.weight.T + layer.adapter.up.bias
    torch.testing.assert_close(layer(x), expected)


@pytest.mark.parametrize("name", PLACES)
def test_a_saved_one_comes_back_in_three_lines(name: str, tmp_path: Path) -> None:
    method = adapter(configuration="houlsby", non_linearity="silu")
    model = method.apply(find_anatomy(build(name)))
    shake(model)
    method.export(model, ((n, p) for n, p in model.named_parameters() if p.requires_grad), tmp_path)
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["adapter_type"] == "bottleneck" and settings["reduction_factor"] == 4
    loaded = load_adapter(build(name), tmp_path)
    assert torch.equal(logits_of(loaded), logits_of(model))
    assert not any(p.requires_grad for n, p in loaded.named_parameters() if ".adapter." in n)


def test_an_adapter_of_another_model_is_refused(tmp_path: Path) -> None:
    method = adapter()
    model = method.apply(find_anatomy(build("llama")))
    method.export(model, ((n, p) for n, p in model.named_parameters() if p.requires_grad), tmp_path)
    with pytest.raises(RequestError, match="other tensors than this model needs"):
        load_adapter(build("gpt2"), tmp_path)
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(RequestError, match="not hold a bottleneck"):
        load_adapter(build("llama"), tmp_path)


def test_experts_are_refused() -> None:
    anatomy = find_anatomy(tiny.build("mixtral"))
    assert find_sublayer_ends(anatomy) == []
    with pytest.raises(RequestError, match="method=lora"):
        adapter().apply(anatomy)


def test_a_base_in_half_precision_takes_an_adapter_in_float32() -> None:
    model = adapter().apply(find_anatomy(build("llama").to(torch.bfloat16)))
    assert logits_of(model).dtype == torch.bfloat16
