"""LoRA over quantised bases: the single process's curve on every engine, bits unchanged, an export that reloads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from dist_ft.merge import main as export_again
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.conftest import config_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS = 6


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose rows are longer than a block of statistics."""
    folder = tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=64, intermediate_size=144, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        vocab_size=211, max_position_embeddings=64,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def frozen_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of everything frozen; as numbers, bits that happen to spell nan would not equal themselves."""
    weights = torch.load(folder / "all_weights.pt", weights_only=True)
    found = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in weights.items() if "lora_" not in n}
    assert any("base_layer" in name for name in found)
    return found


def test_same_curve_on_every_engine(wide: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    runs: dict[tuple, Path] = {}
    for world in (1, 2):
        cases: list[dict[str, Any]] = []
        for scheme in ("nf4", "int8"):
            for engine in ENGINES:
                folder = tmp_path / f"{scheme}-{engine}-{world}"
                config = config_of(folder, wide, rows[0], engine, world, 2, True, {"name": "qlora", "r": 4})
                config["model"]["quantization"] = scheme
                config["train"]["max_steps"] = STEPS
                cases.append({"config": config, "export": world == 2})
                runs[scheme, engine, world] = folder
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)
    for (scheme, engine, world), folder in runs.items():
        curve = [v for m in metrics_of(folder) for v in (m["train/loss"], m["train/grad_norm"])]
        reference = [
            v for m in metrics_of(runs[scheme, "ddp", 1]) for v in (m["train/loss"], m["train/grad_norm"])
        ]
        assert curve == pytest.approx(reference, rel=1e-5), (scheme, engine, world)
        assert curve[-2] < curve[0], "the loss should fall"
        assert frozen_bytes(folder) == frozen_bytes(runs[scheme, "ddp", 1]), (scheme, engine, world)
    losses = {s: metrics_of(runs[s, "ddp", 1])[0]["train/loss"] for s in ("nf4", "int8")}
    assert losses["nf4"] != losses["int8"]


def test_merged_into_the_whole_base(
    wide: str, rows: tuple[str, list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = config_of(tmp_path / "run", wide, rows[0], "ddp", 1, 1, False, {"name": "qlora", "r": 4})
    config["train"]["max_steps"] = 3
    spawn(1, "tests.dist.cases:run_cases", [{"config": config, "export": True}])
    export_again([str(tmp_path / "run"), "merge=true", f"out={tmp_path / 'merged'}"])
    said = capsys.readouterr().out
    assert "against the dequantised nf4 base that was trained on" in said and "merged in memory" in said
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    base = LlamaForCausalLM.from_pretrained(wide)
    change = whole.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    assert 0 < float(change.detach().norm()) < float(base.model.layers[0].self_attn.q_proj.weight.detach().norm())
