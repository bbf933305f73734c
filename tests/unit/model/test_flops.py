"""The counted cost of a step is what torch counts when the step is run, for dense models and mixtures of experts."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedConfig

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.flops import StepCost, count_step_cost
from dist_ft.model.quantize import quantize
from dist_ft.state import Anatomy, BuiltModel
from dist_ft.testing import tiny

BATCH, LENGTH = 3, 11
DENSE = ("llama", "tied", "gpt2")


def make(name: str) -> Any:
    """With eager attention, as torch counts the fused one in another way."""
    if name == "tied":
        return tiny.build("llama", attn_implementation="eager", tie_word_embeddings=True)
    return tiny.build(name, attn_implementation="eager")


def run_and_count(model: Any) -> int:
    """FLOP of the products that torch runs in forward and backward, but for the angles of positions.

    Gradients are wanted of the embeddings' output, so that the first layer works as the others do.
    """
    model.config._experts_implementation = "eager"  # torch does not count the grouped product
    model.train().enable_input_require_grads()
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.randint(tiny.VOCABULARY, (BATCH, LENGTH)), use_cache=False).logits.sum().backward()
    counts = counter.get_flop_counts()
    angles = [sum(count.values()) for name, count in counts.items() if name.endswith("rotary_emb")]
    return counter.get_total_flops() - sum(angles[:1])


def cost_of(model: Any) -> StepCost:
    """Of a model to which no method, or one of peft, is applied."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return count_step_cost(BuiltModel(model, ANATOMIES.setdefault(id(base), find_anatomy(base))))


ANATOMIES: dict[int, Anatomy] = {}  # found before a method is applied


def expected(model: Any) -> float:
    """Eager attention computes the whole square, of which a causal model needs half."""
    cost = cost_of(model)
    return cost.of(BATCH * LENGTH, 2 * BATCH * LENGTH**2)


@pytest.mark.parametrize("name", [*DENSE, *tiny.MIXTURES])
@pytest.mark.parametrize("frozen", [False, True])
def test_as_torch_counts(name: str, frozen: bool) -> None:
    model = make(name)
    model.requires_grad_(not frozen)
    assert expected(model) == run_and_count(model)


@pytest.mark.parametrize("name", ["llama", "mixtral", "deepseek_v3"])
def test_adapters_on_linear_layers(name: str) -> None:
    model = make(name)
    before = cost_of(model.requires_grad_(False)).per_token
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj", "lm_head"]))
    assert expected(adapted) == run_and_count(adapted)
    assert cost_of(adapted).per_token > before


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_adapters_on_fused_experts_count_by_the_share_of_experts_at_work(name: str) -> None:
    """By hand: peft computes the product of the factors for all experts at once, which is no work of the model."""
    model = make(name).requires_grad_(False)
    before = cost_of(model).per_token
    rank, top_k = 2, 2
    adapted = get_peft_model(
        model, LoraConfig(r=rank, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    )
    factors = rank * (16 + 2 * 24) + rank * (24 + 16)  # one expert's: gate_up [16 → 48] and down [24 → 16]
    assert cost_of(adapted).per_token == before + 6 * 3 * top_k * factors


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_a_router_that_learns_as_a_copy_counts_once(name: str) -> None:
    model = make(name).requires_grad_(False)
    before = cost_of(model).per_token
    router = "router" if name == "gpt_oss" else "gate"
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["o_proj"], modules_to_save=[router, "lm_head"]))
    adapters = 6 * 3 * 2 * (16 + 16)
    routers_and_head = 3 * 16 * 4 + 16 * 97
    assert cost_of(adapted).per_token == before + adapters + 2 * routers_and_head


@pytest.mark.parametrize("scheme", ["nf4", "int8"])
@pytest.mark.parametrize("name", ["llama", "mixtral", "qwen3_moe"])
def test_packed_weights_cost_what_they_stand_for(name: str, scheme: str) -> None:
    model = make(name).requires_grad_(False)
    before = cost_of(model)
    assert cost_of(quantize(model, scheme, torch.float32, weights=True)) == before


def test_experts_that_are_modules_of_their_own() -> None:
    """Two of four experts at work; what stands beside them, shared, works for every token."""
    width, experts = 8, 4

    class Router(nn.Linear):
        def forward(self, x: torch.Tensor) -> Any:
            logits = super().forward(x)
            return logits, *logits.softmax(-1).topk(2)

    class Mixture(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = Router(width, experts, bias=False)
            self.experts = nn.ModuleList(nn.Linear(width, 3 * width) for _ in range(experts))
            self.shared_expert = nn.Linear(width, width)

    model = nn.Sequential(nn.ModuleList([nn.ModuleDict({"mlp": Mixture()}) for _ in range(3)]))
    model.config = PreTrainedConfig(num_experts_per_tok=2)  # type: ignore[assignment]
    one_layer = width * experts + 2 * width * 3 * width + width * width
    assert cost_of(model).per_token == 6 * 3 * one_layer
