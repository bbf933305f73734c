"""Starts that move a part of the base: as peft's, kept for who goes on, and taken off again at export."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM
from transformers.pytorch_utils import Conv1D

from dist_ft.config.method import LoraConfig
from dist_ft.config.plan import START_FILE
from dist_ft.errors import RequestError, TrainingError
from dist_ft.export.merge import merge
from dist_ft.export.opened import open_export
from dist_ft.export.probe import compare, probe_model
from dist_ft.method.lora import Lora
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.quantize import quantize
from dist_ft.testing import tiny
from tests.exports import TOKENS, Case, train_a_little
from tests.samples import given, lora

LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
IDS = torch.arange(1, 9)[None]
KINDS = ("pissa", "pissa_niter_8", "olora")
llama, gpt2 = partial(tiny.build, "llama"), partial(tiny.build, "gpt2")


def begun(base: nn.Module, method: Lora, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(3)
    model = method.apply(find_anatomy(base))
    method.begin(model, dtype)
    return model


@pytest.mark.parametrize(
    ("kind", "build", "targets"),
    [("pissa", llama, LINEARS), ("olora", llama, LINEARS), ("pissa", gpt2, ["c_attn", "c_proj"])],
)
def test_the_start_is_pefts_and_the_model_the_base(kind: str, build: Any, targets: list[str]) -> None:
    model = begun(build(), lora(r=4, init_lora_weights=kind, target_modules=targets))
    config = peft.LoraConfig(r=4, lora_alpha=32, target_modules=targets, init_lora_weights=kind)
    expected = peft.get_peft_model(build(), config)
    one, two = dict(model.named_parameters()), dict(expected.named_parameters())
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=0, atol=1e-6)
    torch.testing.assert_close(model.eval()(input_ids=IDS).logits, build().eval()(input_ids=IDS).logits)
    bare, whole = dict(build().named_parameters()), one
    name = next(n for n in whole if n.endswith("base_layer.weight"))
    moved = whole[name] - bare[name.removeprefix("base_model.model.").replace(".base_layer", "")]
    assert torch.linalg.matrix_rank(moved.detach(), rtol=1e-4) == 4, "a part of rank r is in the adapter"


def test_few_iterations_take_nearly_the_best_part() -> None:
    """Of all parts of rank r, that of the largest singular values leaves the least (Eckart and Young)."""
    weight = llama().model.layers[0].mlp.up_proj.weight.detach()
    model = begun(llama(), lora(r=4, init_lora_weights="pissa_niter_8"))
    left = model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight
    least = torch.linalg.svdvals(weight)[4:].norm()
    assert least * 0.9999 < left.norm() < least * 1.01


def test_without_weights_nothing_is_factorised(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory that was never written may hold nan, on which LAPACK does not end."""
    for solver in ("svd", "qr"):
        monkeypatch.setattr(torch.linalg, solver, None)
    for kind in ("pissa", "olora"):
        base = llama()
        before = [p.clone() for p in base.parameters()]
        lora(r=4, init_lora_weights=kind).apply(find_anatomy(base))
        kept = [p for n, p in base.named_parameters() if "lora_" not in n]
        assert all(torch.equal(a, b) for a, b in zip(before, kept, strict=True))


@pytest.mark.parametrize(
    ("settings", "build", "said"),
    [
        ({"target_modules": ["q_proj", "embed_tokens"]}, llama, "embed_tokens is Embedding"),
        ({"r": 33}, llama, "rank 33 is larger"),
        ({"target_modules": ["c_attn"], "init_lora_weights": "olora"}, gpt2, "c_attn is Conv1D"),
        ({"target_modules": ["c_attn", "lm_head"]}, gpt2, "shared with another module"),
        ({}, lambda: quantize(llama(), "nf4", torch.float32, weights=True), "is quantized"),
        (
            {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]},
            lambda: tiny.build("mixtral"),
            "factorizes linear layers",
        ),
    ],
)
def test_what_cannot_be_factorised_is_refused(settings: dict[str, Any], build: Any, said: str) -> None:
    with pytest.raises(RequestError, match=said):
        lora(**{"r": 4, "init_lora_weights": "pissa", **settings}).apply(find_anatomy(build()))


class Begun(Case):
    """A case whose model has begun."""

    def build(self, weights: bool) -> nn.Module:
        model = super().build(weights)
        if weights:
            self.method.begin(model, getattr(torch, self.config.dtype))
        return model


SETTINGS: list[dict[str, Any]] = [
    *({"init_lora_weights": kind} for kind in KINDS),
    {"init_lora_weights": "pissa", "use_rslora": True, "rank_pattern": {"q_proj": 2}, "alpha_pattern": {"v_proj": 3}},
    {"init_lora_weights": "pissa", "use_dora": True},
    {"init_lora_weights": "olora", "modules_to_save": ["embed_tokens"]},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("in_file", [True, False])
def test_plain_peft_over_the_whole_base(
    tiny_llama: Path, tmp_path: Path, settings: dict[str, Any], in_file: bool
) -> None:
    config = LoraConfig(name="lora", r=4, lora_alpha=6, **settings)
    case = Begun(tiny_llama, tmp_path / "model", Lora(config, tmp_path / START_FILE if in_file else None))
    before = probe_model(case.model, given(TOKENS))
    case.export()
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    untrained = probe_model(base, given(TOKENS))
    loaded = peft.PeftModel.from_pretrained(base, str(case.out))
    assert compare(before, probe_model(loaded, given(TOKENS))).relative < 1e-5
    assert compare(before, untrained).relative > 1e-2, "the training is in it"
    ranks = {t.shape[0] for n, t in load_file(case.out / "adapter_model.safetensors").items() if "lora_A" in n}
    assert ranks == ({4, 8} if "rank_pattern" in settings else {8})
    merged = merge(open_export(case.out, case.config, str(tiny_llama)))
    assert compare(before, probe_model(merged, given(TOKENS))).relative < 1e-5
    learned = {name for name, _ in case.weights()}
    case.method.export(loaded, ((n, p) for n, p in loaded.named_parameters() if n in learned), tmp_path / "again")
    again, first = (load_file(folder / "adapter_model.safetensors") for folder in (tmp_path / "again", case.out))
    assert all(torch.equal(again[name], first[name]) for name in again), "what is for the whole base stays so"


@pytest.mark.parametrize("kind", KINDS)
def test_bfloat16_starts_at_what_every_engine_holds(tiny_llama: Path, tmp_path: Path, kind: str) -> None:
    case = Begun(tiny_llama, tmp_path / "model", Lora(LoraConfig(name="lora", r=4, init_lora_weights=kind)), "bfloat16")
    assert case.method.start and all(torch.equal(t, t.bfloat16().float()) for t in case.method.start.values())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        probe = probe_model(case.model, given(TOKENS))
    case.export(probe=probe)


def test_who_goes_on_takes_out_what_was_taken_out(tmp_path: Path) -> None:
    """Where singular values are equal, another machine's part may be another one: the run's is in its file."""
    settings = LoraConfig(name="lora", r=4, init_lora_weights="pissa")
    first = begun(llama(), Lora(settings, tmp_path / START_FILE))
    kept = load_file(tmp_path / START_FILE)
    again = begun(llama(), Lora(settings, tmp_path / START_FILE))
    one, two = dict(first.named_parameters()), dict(again.named_parameters())
    assert all(torch.equal(one[name], two[name]) for name in one)
    save_file({name: 0.5 * tensor for name, tensor in kept.items()}, tmp_path / START_FILE)
    other = begun(llama(), Lora(settings, tmp_path / START_FILE))
    torch.testing.assert_close(other(input_ids=IDS).logits, llama()(input_ids=IDS).logits, rtol=0, atol=1e-5)
    name = next(iter(kept))
    assert torch.equal(dict(other.named_parameters())[name], 0.5 * kept[name])
    save_file({name: kept[name]}, tmp_path / START_FILE)
    with pytest.raises(RequestError, match="other adapters"):
        begun(llama(), Lora(settings, tmp_path / START_FILE))
    (tmp_path / START_FILE).unlink()
    with pytest.raises(RequestError, match="does not exist"):
        Lora(settings, tmp_path / START_FILE).export(first, iter(()), tmp_path / "out")


def test_a_start_that_is_not_taken_off_is_caught(tiny_llama: Path, tmp_path: Path) -> None:
    case = Begun(tiny_llama, tmp_path / "model", Lora(LoraConfig(name="lora", r=4, init_lora_weights="pissa")))
    case.method.start = {name: torch.zeros_like(tensor) for name, tensor in case.method.start.items()}
    with pytest.raises(TrainingError, match="logits after loading differ"):
        case.export()


def test_conv1d_keeps_its_layout() -> None:
    model = train_a_little(begun(gpt2(), lora(r=4, init_lora_weights="pissa", target_modules=["c_attn"])))
    layer = model.base_model.model.transformer.h[0].attn.c_attn
    assert isinstance(layer.get_base_layer(), Conv1D) and layer.get_base_layer().weight.shape == (32, 96)
