"""Fused experts in packed bits: the same forward and gradients as over the dequantised weights, which are not kept."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from dist_ft.config.method import LoraConfig
from dist_ft.errors import RequestError
from dist_ft.inspect.model import count_components
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.quantization import packing
from dist_ft.model.quantization.packed import find_packed
from dist_ft.model.quantization.packing import pack, packed_bytes, unpack
from dist_ft.model.quantize import quantize
from dist_ft.testing.tiny import MIXTURES, build
from tests.samples import SeparateExperts, anatomized

SCHEMES = ("nf4", "int8")
IDS = torch.arange(1, 41).view(2, 20)


def adapted(model: Any) -> Any:
    """With LoRA on attention, whose B does not start at zero, so that each matrix has a gradient."""
    torch.manual_seed(2)
    targets = sorted({name.rsplit(".", 1)[-1] for name in find_anatomy(model).linears if "attn" in name})
    model = Lora(LoraConfig(name="lora", r=2, target_modules=targets)).apply(find_anatomy(model))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.1)
    return model


def pair(name: str, scheme: str) -> tuple[Any, Any]:
    """A quantised model, and one with the weights that it should compute with."""
    quantised, dense = quantize(build(name), scheme, torch.float32, weights=True), build(name)
    bits, parameters = dict(quantised.named_parameters()), dict(dense.named_parameters())
    with torch.no_grad():
        for key, entry in find_packed(quantised).items():
            parameters[key].copy_(unpack(bits[key], *entry, torch.float32))
    return quantised, dense


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("name", MIXTURES)
def test_forward_and_gradients_are_those_of_the_dequantised_model(name: str, scheme: str, implementation: str) -> None:
    gradients = []
    for model in pair(name, scheme):
        model.set_experts_implementation(implementation)
        tuned = adapted(model)
        loss = tuned(input_ids=IDS, labels=IDS).loss
        loss.backward()
        gradients.append({"loss": loss, **{n: p.grad for n, p in tuned.named_parameters() if p.grad is not None}})
    ours, theirs = gradients
    assert set(ours) == set(theirs) and len(ours) > 10
    for key, expected in theirs.items():
        torch.testing.assert_close(ours[key], expected, rtol=1e-5, atol=1e-7, msg=lambda m, key=key: f"{key}: {m}")


@pytest.mark.parametrize("name", MIXTURES)
def test_packed_are_fused_experts_and_linear_layers_and_nothing_else(name: str) -> None:
    plain, model = build(name), quantize(build(name), "nf4", torch.float32, weights=True)
    fused = {n for n, p in plain.named_parameters() if p.ndim == 3}
    assert fused and set(find_packed(model)) == fused | {f"{n}.weight" for n in find_anatomy(plain).linears}
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in plain.named_parameters()]
    assert [(m.router, m.num_experts, m.fused) for m in find_anatomy(model).mixtures] == [
        (m.router, m.num_experts, m.fused) for m in find_anatomy(plain).mixtures
    ]
    before, after = (count_components(anatomized(one)) for one in (plain, model))
    assert after["experts"].parameters == before["experts"].parameters
    assert after["experts"].bytes_by_dtype["nf4"] < 0.6 * after["experts"].parameters
    assert "nf4" not in after["router"].bytes_by_dtype


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_weight_is_kept_for_the_backward(implementation: str, checkpointing: bool) -> None:
    torch.manual_seed(0)
    model = adapted(quantize(build("mixtral"), "nf4", torch.float32, weights=True))
    model.get_base_model().set_experts_implementation(implementation)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    anatomy = find_anatomy(model)
    experts = [part for mixture in anatomy.mixtures for part in anatomy.parts(mixture.experts)]
    slices = [w for e in experts for name in e.packed for w in e.dequantize(name)]
    kept: list[torch.Tensor] = []

    def note(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor.detach().clone())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    matrices = [t for t in kept if t.ndim == 2 and t.is_floating_point()]
    assert matrices and not [t for t in kept if t.ndim == 3 and t.shape[0] == 4]
    assert not any(
        t.shape == w.shape and torch.equal(t, w) for t in matrices for w in [*slices, *(w.T for w in slices)]
    )
    assert not any("lease" in vars(m) for m in model.modules())


@pytest.mark.parametrize("name", ["mixtral", "gpt_oss"])
def test_recomputed_blocks_give_the_same_gradients(name: str) -> None:
    gradients = []
    for checkpointing in (False, True):
        model = adapted(quantize(build(name), "nf4", torch.float32, weights=True)).train()
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        model(input_ids=IDS, labels=IDS).loss.backward()
        gradients.append({n: p.grad for n, p in model.named_parameters() if p.requires_grad})
    for key, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][key], expected, rtol=0, atol=0)


@pytest.mark.parametrize("scheme", SCHEMES)
def test_empty_experts_have_the_same_shapes(scheme: str) -> None:
    full = quantize(build("qwen3_moe"), scheme, torch.bfloat16, weights=True)
    with torch.device("meta"):
        empty = build("qwen3_moe")
    quantize(empty, scheme, torch.bfloat16, weights=False)
    names = list(find_packed(full))
    shapes = [{n: (p.shape, p.dtype) for n, p in m.named_parameters() if n in names} for m in (full, empty)]
    assert shapes[0] == shapes[1] and names == list(find_packed(empty))


@pytest.mark.parametrize("scheme", SCHEMES)
def test_large_weights_are_packed_in_chunks(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    weight = torch.randn(5, 6, 128)
    monkeypatch.setattr(packing, "CHUNK", 4 * 128)
    bits = pack(weight, scheme, torch.bfloat16)
    assert 0 <= bits.numel() * 2 - packed_bytes(scheme, (5, 6, 128)) < 2
    parts = [unpack(pack(w, scheme, torch.bfloat16), scheme, tuple(w.shape), torch.float32)
             for w in weight.view(-1, 128).split(4)]  # fmt: skip
    assert torch.equal(unpack(bits, scheme, (5, 6, 128), torch.float32), torch.cat(parts).view(5, 6, 128))


class LivePeak(TorchDispatchMode):
    """Most bytes of tensors made inside that were alive at once."""

    def __init__(self) -> None:
        super().__init__()
        self.made: list[weakref.ref[torch.Tensor]] = []
        self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.made += [weakref.ref(t) for t in tree_leaves(result) if isinstance(t, torch.Tensor)]
        alive = {
            t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for r in self.made if (t := r()) is not None
        }
        self.peak = max(self.peak, sum(alive.values()))
        return result


@pytest.mark.parametrize("scheme", SCHEMES)
def test_unpacking_a_large_weight_holds_it_once(scheme: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "CHUNK", 8 * 256)
    weight = torch.randn(128, 256)
    bits = pack(weight, scheme, torch.float32)
    with LivePeak() as seen:
        found = unpack(bits, scheme, (128, 256), torch.float32)
    assert found.nbytes <= seen.peak - bits.nbytes < 1.5 * found.nbytes


def test_separate_experts_keep_their_router() -> None:
    model = nn.Sequential(nn.ModuleList(SeparateExperts(64, 4) for _ in range(2)))
    quantize(model, "nf4", torch.float32, weights=True)
    assert (
        len(find_packed(model)) == 8
        and len(find_anatomy(model).mixtures) == 2
        and len(find_anatomy(model).linears) == 8
    )


def test_weights_of_a_forward_are_dropped_after_it() -> None:
    model = quantize(build("mixtral"), "int8", torch.float32, weights=True)
    experts = model.model.layers[0].mlp.experts
    assert isinstance(experts, MixtralExperts) and type(experts).__name__ == "QuantizedMixtralExperts"
    seen: list[torch.Size] = []
    experts.act_fn.register_forward_hook(lambda *_: seen.append(experts.gate_up_proj.shape))
    model(input_ids=IDS)
    assert set(seen) == {(4, 48, 16)} and experts.dequantize("gate_up_proj").shape == (4, 48, 16)
    assert experts.gate_up_proj.ndim == 1 and "lease" not in vars(experts)


def test_adapters_of_packed_experts_are_refused() -> None:
    model = quantize(build("mixtral"), "nf4", torch.float32, weights=True)
    with pytest.raises(RequestError, match="packed in nf4"):
        Lora(LoraConfig(name="lora", r=2, target_parameters=["experts.gate_up_proj"])).apply(find_anatomy(model))


def test_packed_layers_cannot_be_trained_whole() -> None:
    model = quantize(build("mixtral"), "nf4", torch.float32, weights=True)
    with pytest.raises(RequestError, match=r"'q_proj'.*packed in nf4"):
        Lora(LoraConfig(name="lora", r=2, modules_to_save=["q_proj"])).apply(find_anatomy(model))
    tuned = Lora(LoraConfig(name="lora", r=2, modules_to_save=["lm_head"])).apply(find_anatomy(model))
    assert any("lm_head" in name for name, p in tuned.named_parameters() if p.requires_grad)
