"""Mixtures of experts are found from their modules and shapes, in every architecture, under every wrapper."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GptOssConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    OlmoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dist_ft.config.method import FullConfig, LoraConfig
from dist_ft.config.moe import MoeConfig
from dist_ft.errors import RequestError
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention import DOCUMENTS
from dist_ft.model.moe.policy import apply_policy, check_keys, resolve_aux_loss_coef, route_method
from dist_ft.model.moe.routing import Routing
from dist_ft.state import Batch, LossSum
from dist_ft.task.batches.tokens import collate_documents, collate_padded, sum_losses
from tests.samples import apply_method, samples_of

SIZES: dict[str, Any] = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "vocab_size": 97,
    "pad_token_id": 0,
}
CONFIGS = {
    "mixtral": MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8),
    "olmoe": OlmoeConfig(**SIZES, num_experts=4, num_experts_per_tok=2),
    "gpt_oss": GptOssConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2),
    "deepseek_v3": DeepseekV3Config(
        **(SIZES | {"num_key_value_heads": 4}), n_routed_experts=4, num_experts_per_tok=2, n_group=2,
        topk_group=1, moe_intermediate_size=8, first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8,
        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=8,
    ),
}  # fmt: skip


def build(name: str, **changes: Any) -> Any:
    torch.manual_seed(0)
    config = CONFIGS[name].from_dict(CONFIGS[name].to_dict() | changes)
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


class Separate(nn.Module):
    """Experts as modules of their own, each called only where a token chose it."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = nn.Linear(width, experts, bias=False)
        self.experts = nn.ModuleList(nn.Linear(width, width) for _ in range(experts))


@pytest.mark.parametrize("name", CONFIGS)
def test_routers_and_experts_are_found(name: str) -> None:
    model = build(name)
    anatomy = find_anatomy(model)
    found = anatomy.mixtures
    layers = [1, 2] if name == "deepseek_v3" else [0, 1, 2]
    assert [m.layer for m in found] == layers
    for mixture in found:
        mlp = model.model.layers[mixture.layer].mlp
        assert anatomy.part(mixture.name) is mlp and anatomy.part(mixture.experts) is mlp.experts
        assert mixture.fused and mixture.num_experts == 4
        assert anatomy.part(mixture.router) is (mlp.router if name == "gpt_oss" else mlp.gate)
    endings = {linear.rsplit(".", 1)[-1] for linear in anatomy.linears}
    assert not endings & {"gate", "router", "experts", "lm_head"}
    if name == "deepseek_v3":
        assert any("shared_experts" in linear for linear in anatomy.linears)


def test_separate_experts_are_found() -> None:
    model = nn.Sequential(nn.ModuleList(Separate(8, 4) for _ in range(2)))
    assert [(m.layer, m.num_experts, m.fused) for m in find_anatomy(model).mixtures] == [(0, 4, False), (1, 4, False)]


def test_a_dense_model_has_none_and_a_convolution_is_no_expert() -> None:
    class Mixer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv1d = nn.Conv1d(8, 8, 4, groups=1)
            self.dt_proj = nn.Linear(4, 8)

    assert find_anatomy(nn.Sequential(nn.ModuleList([Mixer()]))).mixtures == ()
    assert find_anatomy(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES))).mixtures == ()


@pytest.mark.parametrize("name", CONFIGS)
def test_raw_logits_are_found_among_a_routers_outputs(name: str) -> None:
    for mixture in find_anatomy(build(name)).mixtures:
        form = mixture.form
        assert (form.logits_at, form.indices_at, form.top_k, form.sigmoid) == (0, 2, 2, name == "deepseek_v3")


def test_probabilities_are_not_taken_for_logits() -> None:
    model = build("qwen3_moe")
    anatomy = find_anatomy(model)
    router = anatomy.part(anatomy.mixtures[0].router)
    forward = type(router).forward

    class Softmaxed(type(router)):  # type: ignore[misc]
        def forward(self, x: Any) -> Any:
            logits, scores, indices = forward(self, x)
            return logits.softmax(dim=-1), scores, indices

    router.__class__ = Softmaxed
    with pytest.raises(RequestError, match="does not return the logits"):
        find_anatomy(model)


@pytest.mark.parametrize(
    ("name", "policy"),
    [pair for pair in itertools.product(CONFIGS, ["frozen", "train", "adapt"]) if pair != ("deepseek_v3", "train")],
)
def test_lora_leaves_routers_alone_unless_asked(name: str, policy: Any) -> None:
    model = build(name)
    config = LoraConfig(name="lora", r=2)  # type: ignore[call-arg]
    anatomy = find_anatomy(model)
    mixtures = anatomy.mixtures
    routed = route_method(config, MoeConfig(router=policy), anatomy)  # type: ignore[call-arg]
    Lora(routed).apply(anatomy)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    of_routers = {key for key in trained if any(key.startswith(m.router + ".") for m in mixtures)}
    assert trained - of_routers, "attention"
    assert not any(key.startswith(m.experts + ".") for key in trained for m in mixtures), "experts are not linear"
    if policy == "frozen":
        assert not of_routers
    else:
        assert len(of_routers) >= len(mixtures) and all(("lora_" in key) == (policy == "adapt") for key in of_routers)
    assert model(input_ids=torch.tensor([[1, 2, 3]])).logits.isfinite().all()


def test_names_that_peft_takes_for_experts_are_refused() -> None:
    config = LoraConfig(name="lora", target_modules=["q_a_proj", "gate_proj", "up_proj"])  # type: ignore[call-arg]
    with pytest.raises(RequestError, match="fused gate_up_proj"):
        Lora(config).apply(find_anatomy(build("deepseek_v3")))


@pytest.mark.parametrize("key", ["target_parameters", "modules_to_save"])
def test_a_frozen_router_that_is_a_target_is_a_contradiction(key: str) -> None:
    name = "mlp.gate.weight" if key == "target_parameters" else "gate"
    config = LoraConfig(name="lora", **{key: [name]})  # type: ignore[arg-type]
    with pytest.raises(RequestError, match="is frozen, but"):
        apply_policy(MoeConfig(), config, apply_method(Lora(config), build("qwen3_moe")).anatomy)  # type: ignore[call-arg]


def test_target_parameters_must_match_and_take_no_dropout() -> None:
    config = LoraConfig(name="lora", target_parameters=["mlp.experts.w1"], lora_dropout=0.1)  # type: ignore[call-arg]
    with pytest.raises(RequestError) as error:
        Lora(config).apply(find_anatomy(build("mixtral")))
    assert {p.where for p in error.value.problems} == {"method.target_parameters", "method.lora_dropout"}
    assert "mlp.experts.gate_up_proj" in str(error.value)


def test_keys_of_a_dense_model_are_refused() -> None:
    dense = find_anatomy(AutoModelForCausalLM.from_config(LlamaConfig(**SIZES)))
    check_keys(MoeConfig(), [], dense)  # type: ignore[call-arg]
    check_keys(MoeConfig(router="train"), ["moe.router"], find_anatomy(build("mixtral")))  # type: ignore[call-arg]
    for config, keys in ((MoeConfig(z_loss_coef=0.1), []), (MoeConfig(), ["moe.z_loss_coef"])):  # type: ignore[call-arg]
        with pytest.raises(RequestError, match="no mixture of experts"):
            check_keys(config, keys, dense)


def test_the_models_own_coefficient_counts_where_routers_learn() -> None:
    model, lora, full = build("mixtral"), LoraConfig(name="lora"), FullConfig(name="full")  # type: ignore[call-arg]
    anatomy = find_anatomy(model)
    assert resolve_aux_loss_coef(MoeConfig(), full, anatomy) == model.config.router_aux_loss_coef > 0  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(), lora, anatomy) == 0  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(aux_loss_coef=0.5), lora, anatomy) == 0.5  # type: ignore[call-arg]
    assert resolve_aux_loss_coef(MoeConfig(), full, find_anatomy(build("deepseek_v3"))) == 0  # type: ignore[call-arg]


class Alone:
    """An engine of one process, without anything."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: Any) -> LossSum:
        found: LossSum = loss(self.model, micro)
        return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_the_balance_loss_are_those_of_the_whole_batch(padded: bool, per_layer: bool) -> None:
    dice = np.random.default_rng(0)
    rows = [dice.integers(1, 97, size=length) for length in (5, 9, 3, 12)]
    segments = [{"input_ids": row, "labels": row} for row in rows]
    model = build("olmoe")
    collate: Any = collate_documents
    if padded:
        collate = collate_padded
    else:
        model.set_attn_implementation(DOCUMENTS["eager"])
    routing = Routing(find_anatomy(model), 0.7, 0.0, "train", per_layer=per_layer)
    micros = [collate(samples_of([segments[i]] for i in part)) for part in ((0, 3), (1, 2))]
    routing.survey(micros, Alone(model), sum_losses, lambda phase: None)  # type: ignore[arg-type]
    total = sum(micro.supervised for micro in micros)
    for micro in micros:
        (routing.loss(model, micro, sum_losses).loss / total).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    told = routing.metrics()
    model.zero_grad()
    model.set_attn_implementation("eager")

    outputs = [model(input_ids=torch.from_numpy(row)[None], output_router_logits=True) for row in rows]
    losses = [
        nn.functional.cross_entropy(output.logits[0, :-1], torch.from_numpy(row[1:]), reduction="sum")
        for output, row in zip(outputs, rows, strict=True)
    ]
    layers = tuple(torch.cat(parts) for parts in zip(*(output.router_logits for output in outputs), strict=True))
    groups = [(layer,) for layer in layers] if per_layer else [layers]
    balance = torch.stack([load_balancing_loss_func(group, 4, 2) for group in groups]).mean()
    (torch.stack(losses).sum() / total + 0.7 * balance).backward()
    assert told["moe/aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_balance_does_not_depend_on_what_the_task_weighs() -> None:
    """The engine divides by the batch's weight, which of pairs, say, is not the number of targets."""
    rows = [np.arange(1, 8), np.arange(20, 31)]
    gradients = []
    for weight in (None, 2.0):
        model = build("olmoe")
        routing = Routing(find_anatomy(model), 0.7, 0.3, "train", per_layer=False)
        segments = [[{"input_ids": row, "labels": row}] for row in rows]
        micros = [replace(collate_padded(samples_of([segment])), weight=weight) for segment in segments]

        def nothing(model: nn.Module, batch: Batch) -> LossSum:
            found = sum_losses(model, batch)
            return LossSum(found.loss * 0, torch.tensor(batch.loss_weight))

        routing.survey(micros, Alone(model), nothing, lambda phase: None)  # type: ignore[arg-type]
        for micro in micros:
            (routing.loss(model, micro, nothing).loss / sum(m.loss_weight for m in micros)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_metrics_tell_dead_experts_and_load() -> None:
    model = build("mixtral")
    anatomy = find_anatomy(model)
    for mixture in anatomy.mixtures:
        nn.init.zeros_(anatomy.part(mixture.router).weight)  # ties: the first two are chosen for every token
    routing = Routing(find_anatomy(model), 0.0, 0.0, "frozen", per_layer=False)
    row = np.arange(1, 8)
    micro = collate_padded(samples_of([[{"input_ids": row, "labels": row}]]))
    routing.survey([micro], Alone(model), sum_losses, lambda phase: None)  # type: ignore[arg-type]
    routing.loss(model, micro, sum_losses)
    told = routing.metrics()
    assert (told["moe/load_max"], told["moe/load_min"], told["moe/dead_experts"]) == (2.0, 0.0, 6.0)
    assert told["moe/router_entropy"] == pytest.approx(np.log(4)) == told["moe/layer_2/router_entropy"]
    assert told["moe/layer_0/dead_experts"] == 2 and told["moe/aux_loss"] == pytest.approx(2.0)


def test_equal_experts_give_the_dense_models_logits() -> None:
    torch.manual_seed(0)
    dense = LlamaForCausalLM(LlamaConfig(**SIZES)).eval()
    sizes = SIZES | {"rms_norm_eps": dense.config.rms_norm_eps, "rope_parameters": dense.config.rope_parameters}
    mixture = MixtralForCausalLM(MixtralConfig(**sizes, num_local_experts=4, num_experts_per_tok=2)).eval()
    state = dense.state_dict()
    for name, parameter in mixture.named_parameters():
        if name.endswith("gate_up_proj"):
            mlp = name.replace("experts.gate_up_proj", "")
            one = torch.cat([state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"]])
            parameter.data = one.expand_as(parameter).clone()
        elif name.endswith("experts.down_proj"):
            parameter.data = state[name.replace("experts.down_proj", "down_proj.weight")].expand_as(parameter).clone()
        elif not name.endswith("gate.weight"):
            parameter.data = state[name].clone()
    ids = torch.randint(1, 97, (2, 9))
    torch.testing.assert_close(mixture(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
