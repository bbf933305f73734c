"""Layers whose weight is used without calling them are neither adapted nor packed."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.direct import is_used_directly
from dist_ft.model.miniature import build_miniature
from dist_ft.model.quantization.experts import QuantizedExperts
from dist_ft.model.quantization.linear import QuantizedLinear
from dist_ft.model.quantize import quantize
from dist_ft.model.reach import lies_in

from .library import class_of, published


class Parent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.called, self.asked, self.used, self.sliced = (nn.Linear(4, 4) for _ in range(4))

    def forward(self, x):  # type: ignore[no-untyped-def]
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.weight.dtype == x.dtype:
            x = self.asked(self.called(x))
        return x @ self.used.weight + x @ self.sliced.weight[:, :4]


@pytest.mark.parametrize("name", ["called", "asked", "used", "sliced"])
def test_reading_a_dtype_is_no_use(name: str) -> None:
    assert is_used_directly(Parent(), name) == (name == "used")


@pytest.mark.parametrize("model_type", ["jamba", "mamba2", "falcon_mamba", "llama", "t5"])
def test_uncalled_layers_are_known(model_type: str) -> None:
    """The oracle are hooks: linear layers of a block that a forward on a CPU does not call are used directly."""
    if model_type == "t5":
        from dist_ft.testing import tiny

        model = tiny.build("t5")
        inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[5, 6]])}
    else:
        model = build_miniature(class_of(model_type), published(model_type, 4), "eager", torch.float32)
        inputs = {"input_ids": torch.tensor([[5, 6, 7]]), "use_cache": False}
    called = set()
    for name, module in model.named_modules():
        module.register_forward_hook(lambda *_, name=name: called.add(name))
    model(**inputs)
    anatomy = find_anatomy(model)
    linears = {
        name
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and lies_in(name, anatomy.blocks) and not lies_in(name, anatomy.idle)
    }
    routers = [mixture.router for mixture in anatomy.mixtures]
    assert anatomy.linears and set(anatomy.linears) <= called
    left_out = {name for name in linears - set(anatomy.linears) if not lies_in(name, routers)}
    assert left_out == {name for name in linears if is_used_directly(model, name)}
    assert bool(left_out) == (model_type not in ("llama", "t5"))


def test_a_quantized_jamba_computes() -> None:
    model = build_miniature(class_of("jamba"), published("jamba", 4), "eager", torch.float32)
    packed = quantize(copy.deepcopy(model), "int8", torch.float32, weights=True)
    for name, module in packed.named_modules():
        if isinstance(module, QuantizedLinear):
            model.get_submodule(name).weight.data = module.dequantize(torch.float32)
        for key in module.packed if isinstance(module, QuantizedExperts) else ():
            model.get_parameter(f"{name}.{key}").data = module.dequantize(key, torch.float32)
    expected, found = (each(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits for each in (model, packed))
    torch.testing.assert_close(found, expected)
