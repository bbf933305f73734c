"""Packed weights are bitsandbytes' own, bit for bit, and nothing else of the model changes."""

from __future__ import annotations

import sys
from functools import partial

import bitsandbytes.functional as bnb
import pytest
import torch

from dist_ft.config.method import LoraConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.inspect.model import count_components
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.quantization.linear import QuantizedLinear
from dist_ft.model.quantization.packing import packed_bytes
from dist_ft.model.quantize import quantize
from dist_ft.testing import tiny
from tests.samples import anatomized

SCHEMES = ("nf4", "int8")
DTYPES = (torch.float32, torch.bfloat16)
llama = partial(tiny.build, "llama", hidden_size=64, intermediate_size=160)  # rows of whole blocks of 64 and of others


def layer_of(weight: torch.Tensor, scheme: str, dtype: torch.dtype = torch.float32) -> QuantizedLinear:
    layer = QuantizedLinear(
        weight.shape[1], weight.shape[0], scheme=scheme, dtype=dtype, bias=None, device=torch.device("cpu")
    )
    layer.pack(weight)
    return layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(64, 96), (48, 100), (3, 7 * 64)])
def test_nf4_is_that_of_bitsandbytes(shape: tuple[int, int], dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(shape)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    layer = layer_of(weight, "nf4", dtype)
    assert torch.equal(layer.dequantize(torch.float32), bnb.dequantize_4bit(packed, state))
    assert layer.weight.numel() * layer.weight.element_size() - packed_bytes("nf4", shape) < dtype.itemsize


@pytest.mark.parametrize("dtype", DTYPES)
def test_int8_rounds_each_row_to_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(1)
    weight = torch.randn(40, 64)
    error = (layer_of(weight, "int8", dtype).dequantize(torch.float32) - weight).abs()
    assert bool((error <= weight.abs().amax(dim=1, keepdim=True) / 254 + 1e-6).all()) and float(error.max()) > 0


@pytest.mark.parametrize("scheme", SCHEMES)
def test_gradient_is_that_of_the_dequantised_layer_and_no_weight_is_kept(scheme: str) -> None:
    torch.manual_seed(1)
    layer = layer_of(torch.randn(48, 96), scheme)
    x = torch.randn(2, 5, 96, requires_grad=True)
    twin = x.detach().clone().requires_grad_()
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(
        lambda t: kept.append(t.numel() * t.element_size()) or t, lambda t: t
    ):
        product = layer(x)
    expected = torch.nn.functional.linear(twin, layer.dequantize())
    assert torch.equal(product, expected)
    product.square().sum().backward()
    expected.square().sum().backward()
    torch.testing.assert_close(x.grad, twin.grad)
    assert max(kept) <= packed_bytes(scheme, (48, 96)) + 4, "only bits are kept for the backward"


@pytest.mark.parametrize("scheme", SCHEMES)
def test_only_linear_layers_of_blocks_change(scheme: str) -> None:
    plain, model = llama(), quantize(llama(), scheme, torch.float32, weights=True)
    names = set(find_anatomy(plain).linears)
    assert {n for n, m in model.named_modules() if isinstance(m, QuantizedLinear)} == names
    others = {n: p for n, p in plain.named_parameters() if n.rpartition(".")[0] not in names}
    found = dict(model.named_parameters())
    assert others and all(torch.equal(found[n], p) for n, p in others.items())
    assert "lm_head.weight" in others and set(found) == {n for n, _ in plain.named_parameters()}


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty_modules_have_the_same_shapes(scheme: str) -> None:
    full = quantize(llama(), scheme, torch.bfloat16, weights=True)
    with torch.device("meta"):
        empty = llama()
    quantize(empty, scheme, torch.bfloat16, weights=False)
    shapes = [(n, p.shape, p.dtype) for n, p in full.named_parameters() if "proj" in n]
    assert shapes == [(n, p.shape, p.dtype) for n, p in empty.named_parameters() if "proj" in n]


def test_lora_adapts_the_same_layers_and_holds_no_gradient_for_the_base() -> None:
    plain = Lora(LoraConfig(name="lora", r=4)).apply(find_anatomy(llama()))
    model = Lora(LoraConfig(name="lora", r=4)).apply(
        find_anatomy(quantize(llama(), "nf4", torch.float32, weights=True))
    )
    trained = {n for n, p in model.named_parameters() if p.requires_grad}
    assert trained == {n for n, p in plain.named_parameters() if p.requires_grad}
    model(input_ids=torch.arange(1, 9)[None]).logits.square().sum().backward()
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained


def test_the_table_shows_parameters_and_bytes_of_what_is_packed() -> None:
    plain, packed = (
        count_components(anatomized(model))
        for model in (llama(), quantize(llama(), "nf4", torch.float32, weights=True))
    )
    for kind in ("attention", "mlp"):
        assert packed[kind].parameters == plain[kind].parameters
        assert set(packed[kind].bytes_by_dtype) == {"nf4"}
        assert 0.5 < packed[kind].bytes_by_dtype["nf4"] / packed[kind].parameters < 0.53
    assert packed["embeddings"].bytes_by_dtype == plain["embeddings"].bytes_by_dtype


def test_nf4_takes_at_most_0_6_bytes_a_parameter_all_told() -> None:
    sizes = {"hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 16, "vocab_size": 8192}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 16}
    with torch.device("meta"):
        model = tiny.build("llama", **sizes, **heads, tie_word_embeddings=True).to(torch.bfloat16)
    shares = count_components(anatomized(quantize(model, "nf4", torch.bfloat16, weights=False))).values()
    parameters = sum(share.parameters for share in shares)
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    assert parameters > 100e6 and stored / parameters <= 0.60


def test_a_model_that_would_stay_as_it_is_is_refused_with_the_numbers() -> None:
    model = tiny.build("gpt2")
    with pytest.raises(RequestError, match=r"0\.09 of the blocks' 0\.09 MiB are neither .* \(Conv1D\)"):
        quantize(model, "nf4", torch.float32, weights=True)


def test_a_model_that_is_quantised_already_is_refused() -> None:
    model = llama()
    model.config.quantization_config = {"quant_method": "bitsandbytes"}
    with pytest.raises(RequestError, match="already quantized"):
        quantize(model, "nf4", torch.float32, weights=True)


def test_without_bitsandbytes_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "bitsandbytes.functional", None)
    with pytest.raises(MachineError, match="pip install bitsandbytes"):
        quantize(llama(), "nf4", torch.float32, weights=True)
