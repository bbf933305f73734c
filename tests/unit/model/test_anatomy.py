"""Blocks, linear layers, routers and experts are found from modules and shapes, in every architecture."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from dist_ft.model.anatomy import find_anatomy
from dist_ft.testing import tiny
from tests.samples import SeparateExperts


def build(name: str, auto_class: str | None = None) -> Any:
    with torch.device("meta"):
        return tiny.build(name, auto_class)


def test_blocks_of_a_decoder_are_its_layers() -> None:
    model = build("llama")
    anatomy = find_anatomy(model)
    assert anatomy.parts(anatomy.blocks) == list(model.model.layers)


def test_blocks_of_an_encoder_decoder_are_those_of_both() -> None:
    model = build("t5", "AutoModel")
    anatomy = find_anatomy(model)
    assert anatomy.parts(anatomy.blocks) == [*model.encoder.block, *model.decoder.block]


def test_linears_are_those_of_the_blocks_without_the_head() -> None:
    names = find_anatomy(build("llama")).linears
    assert len(names) == 2 * 7 and not any("lm_head" in name for name in names)


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_no_router_is_a_target(name: str) -> None:
    linears = find_anatomy(build(name)).linears
    assert linears and not any(name.rsplit(".", 1)[-1] in ("gate", "router") for name in linears)


def test_a_router_that_is_a_linear_layer_is_found() -> None:
    class Model(nn.Module):
        config = type("Config", (), {"num_experts": 4})()

        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.ModuleList(SeparateExperts(8, 4) for _ in range(2))

    model = Model()
    anatomy = find_anatomy(model)
    assert anatomy.parts(m.router for m in anatomy.mixtures) == [layer.gate for layer in model.layers]
    assert len(anatomy.linears) == 8 and anatomy.parts(anatomy.blocks) == list(model.layers)


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_routers_and_experts_are_found(name: str) -> None:
    model = tiny.build(name)
    anatomy = find_anatomy(model)
    found = anatomy.mixtures
    layers = [1, 2] if name == "deepseek_v3" else [0, 1, 2]
    assert [m.layer for m in found] == layers
    for mixture in found:
        mlp = model.model.layers[mixture.layer].mlp
        assert anatomy.part(mixture.name) is mlp and anatomy.parts(mixture.experts) == [mlp.experts]
        assert mixture.fused and mixture.num_experts == 4
        assert anatomy.part(mixture.router) is (mlp.router if name == "gpt_oss" else mlp.gate)
    endings = {linear.rsplit(".", 1)[-1] for linear in anatomy.linears}
    assert not endings & {"gate", "router", "experts", "lm_head"}
    if name == "deepseek_v3":
        assert any("shared_experts" in linear for linear in anatomy.linears)


def test_separate_experts_are_found() -> None:
    model = nn.Sequential(nn.ModuleList(SeparateExperts(8, 4) for _ in range(2)))
    assert [(m.layer, m.num_experts, m.fused) for m in find_anatomy(model).mixtures] == [(0, 4, False), (1, 4, False)]


def test_a_dense_model_has_none_and_a_convolution_is_no_expert() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(8, 8, 4, groups=1)
            self.dt_proj = nn.Linear(4, 8)

    assert find_anatomy(nn.Sequential(nn.ModuleList([Mixer()]))).mixtures == ()
    assert find_anatomy(build("llama")).mixtures == ()
