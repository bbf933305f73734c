"""Mixtures are found by what their modules do, in every causal language model of transformers."""

from __future__ import annotations

import functools
import re
import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import NllbMoeConfig, NllbMoeForConditionalGeneration, PreTrainedModel
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeTopKRouter

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.config.moe import MoeConfig
from dist_ft.errors import RequestError
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.miniature import build_miniature, draw_weights
from dist_ft.model.moe import choices
from dist_ft.model.moe.policy import apply_policy, check_keys, describe_unmeasured, resolve_aux_loss_coef
from dist_ft.model.moe.routing import Routing, build_routing
from dist_ft.model.reach import lies_in
from dist_ft.state import Anatomy, Batch, LossSum
from dist_ft.testing.tiny import build

from ..library import CAUSAL, class_of, published

# by model type: the router and the experts in their block, and whether the routing can be measured
UNUSUAL = {
    "afmoe": ("mlp.router", ["mlp.experts"], True),  # a linear layer in the router
    "dbrx": ("ffn.router", ["ffn.experts.mlp"], True),  # two-dimensional experts; the mixture itself chooses
    "deepseek_v4": ("mlp.gate", ["mlp.experts"], True),  # experts by token id in the first layers
    "doge": ("mlp.router_gate", ["mlp.down_embed", "mlp.up_embed"], False),  # experts are rows of embeddings
    "gemma4_text": ("router", ["experts"], True),  # returns probabilities
    "hunyuan_v1_moe": ("mlp.gate", ["mlp.experts"], True),
    "inkling_text": ("mlp.gate", ["mlp.experts"], True),  # has logits for shared experts too
    "jetmoe": ("mlp.router", ["mlp.input_linear", "mlp.output_linear"], True),
    "lfm2_moe": ("feed_forward.gate", ["feed_forward.experts"], True),  # takes a bias as an argument
    "llama4_text": ("feed_forward.router", ["feed_forward.experts"], True),
    "longcat_flash": ("mlp.router", ["mlp.experts"], True),  # experts without weights
    "minimax_m2": ("mlp.gate", ["mlp.experts"], True),
    "phimoe": ("mlp.router", ["mlp.experts"], True),
    "zaya": ("mlp.gate", ["mlp.experts"], False),  # an MLP that may choose no expert
}


@functools.cache
def make(model_type: str, layers: int = 4) -> PreTrainedModel:
    """A miniature with a few layers of a model type, with as many experts per token as published models."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings = published(model_type, layers)
        model = build_miniature(class_of(model_type), settings, "eager", torch.float32, keep_top_k=True)
    draw_weights(model, seed=7)
    return model


def in_block(anatomy: Anatomy, name: str, layer: int) -> str:
    return name.removeprefix(f"{anatomy.blocks[layer]}.")


@pytest.mark.parametrize("model_type", UNUSUAL)
def test_unusual_routers_are_found(model_type: str) -> None:
    model = make(model_type)
    anatomy = find_anatomy(model)
    router, experts, measured = UNUSUAL[model_type]
    mixtures = [m for m in anatomy.mixtures if "attention" not in m.router]
    assert mixtures and not any(lies_in(name, [m.router for m in anatomy.mixtures]) for name in anatomy.linears)
    for mixture in mixtures:
        assert in_block(anatomy, mixture.router, mixture.layer) == router
        assert [in_block(anatomy, name, mixture.layer) for name in mixture.experts] == experts
        assert (mixture.form is not None) == measured == (mixture.why_unmeasured is None)


@pytest.mark.parametrize("model_type", sorted(UNUSUAL.keys() - {"doge", "zaya", "jetmoe", "llama4_text"}))
def test_the_experts_that_are_counted_are_those_that_compute(model_type: str) -> None:
    """What the experts are given as their indices, in a forward of other weights and tokens, is what was counted."""
    model = make(model_type)
    anatomy = find_anatomy(model)
    given: dict[str, tuple[Tensor, Tensor]] = {}
    for mixture in anatomy.mixtures:
        module = anatomy.part(mixture.experts[0].removesuffix(".mlp"))
        name = mixture.name
        module.register_forward_pre_hook(lambda _, args, name=name: given.update({name: (args[1], args[2])}))
    routing = Routing(anatomy, 0.0, 0.0, "frozen", per_layer=True)

    def forward(model: Any, batch: Batch) -> LossSum:
        model(**batch.inputs, use_cache=False)
        return LossSum(torch.zeros(()), torch.ones(()))

    ids = torch.randint(1, 60, (1, 11), generator=torch.Generator().manual_seed(5))
    batch = Batch({"input_ids": ids}, targets=ids[0], positions=ids[0], documents=ids[0], tokens=11)
    with torch.no_grad():
        outputs = routing._watch(model, batch, forward)[1]
    for mixture, (logits, chosen, _) in zip(anatomy.mixtures, outputs, strict=True):
        indices, weights = given[mixture.name]
        assert mixture.form is not None and logits.shape == (11, mixture.num_experts)
        assert torch.equal(chosen.sort().values, indices.reshape(11, -1).sort().values)
        if model_type in ("deepseek_v4", "phimoe"):  # weigh experts by other functions of the logits
            continue
        scores = (logits.sigmoid() if mixture.form.sigmoid else logits.softmax(-1)).gather(1, indices.reshape(11, -1))
        shares = weights.reshape(11, -1) / weights.reshape(11, -1).sum(-1, keepdim=True)
        torch.testing.assert_close(shares, scores / scores.sum(-1, keepdim=True), rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_no_mixture_is_taken_for_a_dense_model() -> None:
    """The names of classes and modules, which the product does not read, tell the same."""
    wrong = {}
    named = {class_of(name): name for name in CAUSAL if "expert" in published(name).to_json_string(use_diff=False)}
    for model_type in sorted({*named.values(), "xlnet", "llama", "gpt2"}):
        try:
            model = make.__wrapped__(model_type)
        except Exception:  # no model can be built from its configuration
            continue
        anatomy = find_anatomy(model)
        experts = [name for name, module in model.named_modules() if re.search(r"Experts|CDMoE", type(module).__name__)]
        homes = [mixture.name for mixture in anatomy.mixtures]
        lost = [name for name in experts if not any(lies_in(name, [home]) for home in homes) and "shared" not in name]
        taken = [name for name in anatomy.linears if re.search(r"router|\.gate(\.|$)|experts\.\d+\.gate$", name)]
        if lost or taken or (homes and not experts and model_type != "jetmoe"):
            wrong[model_type] = (lost[:1], taken[:1], homes[:1])
    assert not wrong


def test_experts_in_a_dictionary_and_routers_that_choose_in_another_way() -> None:
    """NLLB chooses its second expert after masking the first: its routers are known, and not measured."""
    settings = NllbMoeConfig(encoder_layers=2, decoder_layers=2, encoder_sparse_step=2, decoder_sparse_step=2)
    anatomy = find_anatomy(build_miniature(NllbMoeForConditionalGeneration, settings, "eager", torch.float32))
    assert [(m.router.rsplit(".", 1)[-1], m.fused, m.form) for m in anatomy.mixtures] == [("router", False, None)] * 2
    lora, full = LoraConfig(name="lora", r=2), FullConfig(name="full")  # type: ignore[call-arg]
    assert build_routing(MoeConfig(), full, anatomy) is None  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(), full, anatomy) == 0  # type: ignore[call-arg]
    (line,) = describe_unmeasured(anatomy)
    assert "does not choose the experts with the largest logits" in line
    for key in ("z_loss_coef", "aux_loss_coef"):
        with pytest.raises(RequestError, match="cannot be measured"):
            check_keys(MoeConfig(**{key: 0.1}), [f"moe.{key}"], anatomy)  # type: ignore[arg-type]
    Lora(lora).apply(anatomy)
    apply_policy(MoeConfig(), lora, anatomy)  # type: ignore[call-arg]
    trained = [name for name, p in anatomy.model.named_parameters() if p.requires_grad]
    assert trained and not any("router" in name for name in trained)


@pytest.fixture
def forgetful() -> Any:
    """Nothing is remembered of a class whose modules a test changes."""
    choices._observe.cache_clear()
    yield
    choices._observe.cache_clear()


def test_probabilities_are_not_taken_for_logits(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forward = Qwen3MoeTopKRouter.forward

    def softmaxed(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        logits, scores, indices = forward(self, x)
        return logits.softmax(dim=-1), scores, indices

    monkeypatch.setattr(Qwen3MoeTopKRouter, "forward", softmaxed)
    mixture = find_anatomy(build("qwen3_moe")).mixtures[0]
    assert mixture.form is None and "does not return the logits" in str(mixture.why_unmeasured)


def test_shapes_tell_routers_where_no_small_model_can_be_computed(
    forgetful: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any, **settings: Any) -> None:
        raise ValueError("needs an image")

    monkeypatch.setattr(choices, "build_miniature", fail)
    for model in (build("mixtral"), make("afmoe"), make("qwen3_next")):
        anatomy = find_anatomy(model)
        assert anatomy.mixtures and all(m.router.endswith(("mlp.gate", "mlp.router")) for m in anatomy.mixtures)
        assert all(m.form is None and "no small model" in str(m.why_unmeasured) for m in anatomy.mixtures)


def test_experts_that_only_the_configuration_tells_of(forgetful: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where routers cannot be told from other linear layers, all of them are no targets."""
    model = build("llama", num_experts=8)
    assert find_anatomy(model).lost_experts is None  # its miniature chooses nothing
    choices._observe.cache_clear()
    monkeypatch.setattr(choices, "build_miniature", None)
    anatomy = find_anatomy(model)
    assert anatomy.lost_experts == "num_experts=8" and list(describe_unmeasured(anatomy))
    lora = LoraConfig(name="lora", target_modules="all-linear")  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="could adapt routers"):
        apply_policy(MoeConfig(), lora, anatomy)  # type: ignore[call-arg]
    apply_policy(MoeConfig(), LoraConfig(name="lora", target_modules=["q_proj"]), anatomy)  # type: ignore[call-arg]
