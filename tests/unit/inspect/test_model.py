"""Tests of the tables of a plan against real models, and of the memory estimate against allocated tensors."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from dist_ft.config.engine import DdpConfig, FsdpConfig, Zero3Config, Zero12Config
from dist_ft.config.method import LoraConfig
from dist_ft.inspect import model as inspection
from dist_ft.inspect.memory import Part, Sizes, estimate_memory
from dist_ft.method.lora import Lora
from dist_ft.testing import tiny
from tests.samples import anatomized, apply_method

SMALL = {
    "vocab_size": 64,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def test_components_of_a_dense_model() -> None:
    model = tiny.build("llama", **SMALL, tie_word_embeddings=False).bfloat16()
    shares = inspection.count_components(anatomized(model))
    attention = 3 * (16 * 16 * 2 + 16 * 8 * 2)
    wanted = {
        "embeddings": 64 * 16,
        "attention": attention,
        "mlp": 3 * 3 * 16 * 24,
        "norms": 16 * (2 * 3 + 1),
        "head": 64 * 16,
    }
    assert {kind: share.parameters for kind, share in shares.items()} == wanted
    assert sum(wanted.values()) == model.num_parameters()
    assert shares["attention"].bytes_by_dtype == {"bfloat16": 2 * attention}


def test_components_of_a_mixture_and_its_adapters() -> None:
    base = tiny.build("mixtral", **SMALL, tie_word_embeddings=True)
    shares = inspection.count_components(anatomized(base))
    assert shares["router"].parameters == 3 * 4 * 16 and shares["experts"].parameters == 3 * 4 * 3 * 16 * 24
    assert "head" not in shares and shares["embeddings"].parameters == 64 * 16
    total = sum(share.parameters for share in shares.values())
    assert total == sum(p.numel() for p in base.parameters())
    method = Lora(LoraConfig(name="lora", r=2, target_modules=["q_proj"], modules_to_save=["lm_head"]))
    built = apply_method(method, base)
    model, adapted = built.model, inspection.count_components(built, whole=False)
    assert adapted["adapters"].parameters == adapted["adapters"].trainable == 3 * (2 * 16 + 16 * 2)
    assert adapted["head"].trainable == 64 * 16 and adapted["attention"].parameters == shares["attention"].parameters
    assert sum(share.parameters for share in adapted.values()) == sum(p.numel() for p in model.parameters())
    assert inspection.count_trainable(model) == {
        "model.layers.*.self_attn.q_proj.lora_A.weight": (3, (2, 16), 3 * 32),
        "model.layers.*.self_attn.q_proj.lora_B.weight": (3, (16, 2), 3 * 32),
        "lm_head.weight": (1, (64, 16), 64 * 16),
    }


def held_bytes(module: nn.Module, optimizer: torch.optim.Optimizer) -> int:
    tensors = [*module.parameters(), *(p.grad for p in module.parameters() if p.grad is not None)]
    tensors += [t for state in optimizer.state.values() for t in state.values() if t.ndim]
    return sum(t.numel() * t.element_size() for t in tensors)


def test_memory_of_one_process_is_what_torch_holds() -> None:
    model = nn.Sequential(nn.Linear(8, 8, bias=False).bfloat16().requires_grad_(False), nn.Linear(8, 8, bias=False))
    optimizer = torch.optim.AdamW(model[1].parameters())
    model[1](torch.ones(8)).sum().backward()
    optimizer.step()
    sizes = Sizes(frozen_bytes=2 * 64, trained=64, compute_bytes=4, largest_block=64, blocks=128, outside=0)
    assert total(estimate_memory(DdpConfig(name="ddp"), 4, sizes)) == held_bytes(model, optimizer)
    assert total(estimate_memory(FsdpConfig(name="fsdp"), 1, sizes)) == held_bytes(model, optimizer)


def total(parts: list[Part]) -> int:
    return sum(part.device + part.host for part in parts)


@pytest.mark.parametrize(
    ("name", "per_parameter"),
    # Rajbhandari et al. 2020, section 5, but with gradients of 4 bytes: 2 + 4 + 12 bytes per parameter, of which stages
    # 1, 2 and 3 shard more and more
    [("zero1", 2 + 4 + 12 / 64), ("zero2", 2 + (4 + 12) / 64), ("zero3", 18 / 64)],
)
def test_zero_shards_as_the_paper_says(name: str, per_parameter: float) -> None:
    trained = 7_500_000_000
    config = Zero3Config(name="zero3") if name == "zero3" else Zero12Config(name=name)  # type: ignore[arg-type]
    parts = estimate_memory(config, 64, Sizes(0, trained, 2, 0, 0, 0))
    assert total(parts) == pytest.approx(per_parameter * trained)
    assert sum(part.host for part in parts) == 0


def test_checkpoints_are_written_from_one_copy_of_the_state_that_the_ranks_share() -> None:
    sizes = Sizes(100, 1000, 2, 10, 80, 20)
    for config in (DdpConfig(name="ddp"), FsdpConfig(name="fsdp"), Zero12Config(name="zero1")):
        with_copy = {part.name: part for part in estimate_memory(config, 8, sizes, async_save=True)}
        copy = with_copy.pop("copy for checkpoints")
        assert (copy.device, copy.host) == (0, 12 * 1000 // 8)
        assert list(with_copy.values()) == estimate_memory(config, 8, sizes)


def test_offloading_moves_to_the_host() -> None:
    sizes = Sizes(100, 1000, 2, 10, 80, 20)
    kept = total(estimate_memory(FsdpConfig(name="fsdp"), 2, sizes))
    parts = estimate_memory(FsdpConfig(name="fsdp", offload="params"), 2, sizes)
    gathered = ["gathered blocks", "gathered outside blocks"]
    assert total(parts) == kept and [part.name for part in parts if part.device] == gathered
    optimizer = estimate_memory(Zero12Config(name="zero2", offload="optimizer"), 2, sizes)
    assert {part.name: bool(part.host) for part in optimizer} == {
        "weights": False,
        "gradients": True,
        "float32 weights and AdamW moments": True,
    }


def test_inspection_shows_model_method_memory_and_data(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inspection.main([str(lora_run / "run.yaml")])
    shown = capsys.readouterr().out
    for words in ("embeddings", "adapters", "layers.*.self_attn.q_proj.lora_A", "AdamW moments", "supervised tokens"):
        assert words in shown
