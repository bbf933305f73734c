"""Adapters of fused experts compute what peft's do, and autograd keeps no merged weight."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import Tensor

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.moe import adapted
from dist_ft.model.moe.adapted import MergedOnDemand
from dist_ft.model.quantization.lease import Lease
from dist_ft.testing import tiny
from tests.samples import lora

RANK, SCALE = 3, 2.0  # a rank that is not the number of experts
TARGETS = ["experts.gate_up_proj", "experts.down_proj"]
IDS = torch.arange(1, 41).view(2, 20)
KERNELS = ("eager", "grouped_mm")


def adapt(name: str, experts: str = "eager", *, ours: bool = True, **changes: Any) -> Any:
    """A mixture whose experts have adapters that do something, by this package or by peft alone."""
    model = tiny.build(name, **changes)
    model.config._experts_implementation = experts
    method = lora(r=RANK, lora_alpha=SCALE * RANK, target_modules=["o_proj"], target_parameters=TARGETS)
    with pytest.MonkeyPatch.context() as patch:
        if not ours:
            patch.setattr("dist_ft.method.lora.merge_on_demand", lambda model: None)
        model = method.apply(find_anatomy(model))
    torch.manual_seed(5)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = 0.1 * torch.randn_like(parameter)
    assert any(isinstance(m, MergedOnDemand) for m in model.modules()) == ours
    return model


def run(model: Any) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and gradients by name."""
    logits = model(input_ids=IDS, use_cache=False).logits
    logits.float().square().sum().backward()
    return logits.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("experts", KERNELS)
@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_logits_and_gradients_are_those_of_peft(name: str, experts: str) -> None:
    (logits, gradients), (expected, wanted) = (run(adapt(name, experts, ours=ours)) for ours in (True, False))
    assert torch.equal(logits, expected)
    assert gradients.keys() == wanted.keys() and sum("experts" in n for n in gradients) > 0
    assert all(torch.equal(gradients[n], wanted[n]) for n in wanted)


@pytest.mark.parametrize("name", tiny.MIXTURES)
def test_logits_and_gradients_are_those_of_weights_merged_by_hand(name: str) -> None:
    logits, gradients = run(adapt(name))
    model = adapt(name)
    plain = tiny.build(name)
    plain.config._experts_implementation = "eager"
    factors = {n: p.detach().clone().requires_grad_() for n, p in model.named_parameters() if p.requires_grad}
    merged = dict(plain.named_parameters())
    for key, a in factors.items():
        if ".lora_A." not in key:
            continue
        b = factors[key.replace(".lora_A.", ".lora_B.")]
        wrapper = model.get_submodule(key.partition(".lora_A.")[0])
        experts = key.partition(".lora_A.")[0].removeprefix("base_model.model.").replace(".base_layer", "")
        if not hasattr(wrapper, "parameter_name"):
            merged[f"{experts}.weight"] = merged[f"{experts}.weight"] + SCALE * b @ a
            continue
        weight = merged[f"{experts}.{wrapper.parameter_name}"]
        count = weight.shape[0]
        a_of, b_of = a.view(count, RANK, -1), b.view(b.shape[0], RANK, count)  # peft's layouts differ
        order = "ore,eri->eio" if name == "gpt_oss" else "ore,eri->eoi"  # as the experts hold their weights
        merged[f"{experts}.{wrapper.parameter_name}"] = weight + SCALE * torch.einsum(order, b_of, a_of)
    found = torch.func.functional_call(plain, merged, kwargs={"input_ids": IDS, "use_cache": False}).logits
    torch.testing.assert_close(logits, found, rtol=1e-5, atol=1e-5)
    found.float().square().sum().backward()
    for key, factor in factors.items():
        assert factor.grad is not None and float(factor.grad.abs().max()) > 0, key
        torch.testing.assert_close(gradients[key], factor.grad, rtol=1e-4, atol=1e-5, msg=key)


def kept_bytes(model: Any) -> tuple[int, Callable[[], None]]:
    """Bytes of storages that autograd keeps of a forward, weights excepted; and the backward."""
    weights = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept: dict[int, int] = {}
    held: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        held.append(tensor)  # so that no other takes its place
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    return sum(size for key, size in kept.items() if key not in weights), loss.backward


@pytest.mark.parametrize("experts", KERNELS)
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss"])
def test_no_merged_weight_is_kept_for_the_backward(name: str, experts: str) -> None:
    """peft keeps one of each adapted parameter."""
    sizes = {"hidden_size": 64, "intermediate_size": 96, "moe_intermediate_size": 96, "num_hidden_layers": 4}
    ours, theirs = (adapt(name, experts, ours=ours, **sizes) for ours in (True, False))
    merged = sum(p.numel() * p.element_size() for n, p in ours.named_parameters() if p.ndim == 3)
    found, backward = kept_bytes(ours)
    expected, _ = kept_bytes(theirs)
    assert merged > 1_000_000 and expected - found == merged
    leases = [entry for entry in gc.get_objects() if isinstance(entry, Lease)]
    assert leases and not any(lease.weights for lease in leases), "after the forward"
    backward()
    assert not any(lease.weights or +lease.notes for lease in leases), "after the backward"


@pytest.mark.parametrize("experts", KERNELS)
def test_recomputed_blocks_give_the_same(experts: str) -> None:
    model, other = adapt("qwen3_moe", experts), adapt("qwen3_moe", experts)
    other.get_base_model().gradient_checkpointing_enable({"use_reentrant": False})
    (logits, gradients), (expected, wanted) = run(model.train()), run(other.train())
    assert torch.equal(logits, expected) and all(torch.equal(gradients[n], wanted[n]) for n in wanted)


def test_without_adapters_and_without_gradients_the_model_is_the_base() -> None:
    model = adapt("qwen3_moe")
    with torch.no_grad():
        adapted_logits = model(input_ids=IDS).logits
    with model.disable_adapter():
        base = model(input_ids=IDS).logits
    assert torch.equal(base, tiny.build("qwen3_moe")(input_ids=IDS).logits)
    assert not torch.allclose(base, adapted_logits) and torch.equal(adapted_logits, run(model)[0])


def test_a_second_backward_through_the_graph_gives_the_same() -> None:
    """As private runs under FSDP2 need it."""
    model = adapt("qwen3_moe")
    loss = model(input_ids=IDS, use_cache=False).logits.square().sum()
    factors = [p for p in model.parameters() if p.requires_grad]
    first = torch.autograd.grad(loss, factors, retain_graph=True)
    assert all(torch.equal(*pair) for pair in zip(first, torch.autograd.grad(loss, factors), strict=True))


def test_exports_load_and_merge_by_peft(tmp_path: Path) -> None:
    model = adapt("qwen3_moe").eval()
    weights = ((n, p.data) for n, p in model.named_parameters() if p.requires_grad)
    lora(r=RANK).export(model, weights, tmp_path)
    with torch.no_grad():
        expected = model(input_ids=IDS).logits
        loaded = peft.PeftModel.from_pretrained(tiny.build("qwen3_moe"), tmp_path).eval()
        assert not any(isinstance(m, adapted.MergedOnDemand) for m in loaded.modules())
        torch.testing.assert_close(loaded(input_ids=IDS).logits, expected)
        torch.testing.assert_close(loaded.merge_and_unload()(input_ids=IDS).logits, expected)
