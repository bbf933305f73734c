"""The parts that text does not reach are those whose parameters have no gradient after a text's backward."""

from __future__ import annotations

import warnings

import pytest
import torch
from transformers import BlipConfig, BlipForConditionalGeneration, PreTrainedModel

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.flops import count_step_cost
from dist_ft.model.reach import find_idle, lies_in, name_idle
from dist_ft.model.sublayers import find_sublayer_ends
from dist_ft.state import BuiltModel
from dist_ft.testing import tiny
from tests import multimodal


@pytest.mark.parametrize("name", multimodal.MODELS)
def test_idle_parts_are_those_without_a_gradient(name: str) -> None:
    model = multimodal.build(name)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # that there is no trace
        idle = find_idle(model)
    assert set(idle) == set(multimodal.IDLE[name])
    assert all(parameter.device.type == "cpu" and parameter.grad is None for parameter in model.parameters())
    multimodal.run_text(model)
    missing = multimodal.without_gradient(model)
    assert missing == {n for n, _ in model.named_parameters() if lies_in(n, idle)} and missing


@pytest.mark.parametrize("name", multimodal.MODELS)
def test_the_anatomy_is_that_of_the_language_model(name: str) -> None:
    model = multimodal.build(name)
    anatomy = find_anatomy(model)
    text = model.model.language_model
    blocks = [block for i, block in enumerate(text.layers) if (name, i) != ("mllama", 1)]
    assert anatomy.parts(anatomy.blocks) == blocks
    inside = {id(module) for block in blocks for module in block.modules()}
    assert anatomy.linears and all(id(module) in inside for module in anatomy.parts(anatomy.linears))
    assert {id(m) for m in anatomy.parts(anatomy.norms)} <= inside | {id(text.norm)}
    assert anatomy.part(anatomy.embeddings or "") is text.embed_tokens and anatomy.head == "lm_head"
    assert len(anatomy.mixtures) == (3 if name == "qwen3_vl_moe" else 0)
    if name != "qwen3_vl_moe":
        ends = find_sublayer_ends(anatomy)
        assert len(ends) == 2 * len(blocks) and not any(lies_in(end.name, anatomy.idle) for end in ends)


def test_ranks_without_weights_find_the_same() -> None:
    with torch.device("meta"):
        empty = multimodal.build("gemma3")
        assert find_idle(empty) == find_idle(multimodal.build("gemma3")) == list(multimodal.IDLE["gemma3"])


def test_idle_parts_cost_no_work() -> None:
    """As many FLOP as the language model alone."""
    model = multimodal.build("gemma3")
    cost = count_step_cost(BuiltModel(model, find_anatomy(model)))
    inside = sum(m.weight.numel() for m in model.model.language_model.modules() if isinstance(m, torch.nn.Linear))
    assert cost.per_token == 6 * (inside + model.lm_head.weight.numel())
    assert cost.per_pair == 3 * (4 * 2 * 8) * 3, "4 heads of 8 features, queries and values, 3 layers"


def test_a_model_of_text_alone_is_not_traced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("dist_ft.model.reach._reached_by_text", lambda model: pytest.fail("traced"))
    assert find_anatomy(tiny.build("llama")).idle == ()
    assert find_anatomy(tiny.build("t5")).idle == ()


def test_without_a_trace_the_towers_are_idle_and_said_so() -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = BlipConfig(text_config={**sizes, "vocab_size": 97}, vision_config={**sizes, "image_size": 16})
    model: PreTrainedModel = BlipForConditionalGeneration(config)
    with pytest.warns(UserWarning, match=r"BlipForConditionalGeneration: no trace of a text .*pixel_values"):
        assert find_idle(model) == ["vision_model"]


def test_the_message_names_layers_once_and_counts_parameters() -> None:
    model = multimodal.build("mllama")
    anatomy = find_anatomy(model)
    count = sum(p.numel() for n, p in model.named_parameters() if lies_in(n, anatomy.idle))
    names = "model.vision_model, model.language_model.layers.*, model.multi_modal_projector"
    assert name_idle(anatomy) == f"{names} ({count:,} parameters)"
