"""LoRA over quantised bases: the single process's curve on every engine, bits unchanged, an export that reloads."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaForCausalLM

from dist_ft.checkpoint.reader import SafeReader
from dist_ft.export.merge import main as export_again
from dist_ft.testing import tiny
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS = 6


@pytest.fixture(scope="module")
def wide(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny Llama whose rows are longer than a block of statistics."""
    return tiny.save("llama", tmp_path_factory.mktemp("wide"), hidden_size=64, intermediate_size=144)


def frozen_bytes(folder: Path) -> dict[str, bytes]:
    """The bytes of everything frozen; as numbers, bits that happen to spell nan would not equal themselves."""
    weights = torch.load(folder / "all_weights.pt", weights_only=True)
    found = {n: t.contiguous().view(torch.uint8).numpy().tobytes() for n, t in weights.items() if "lora_" not in n}
    assert any("base_layer" in name for name in found)
    return found


@pytest.fixture(scope="module")
def mixture(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny mixture whose experts are fused, two of four to a token."""
    sizes = {"hidden_size": 64, "moe_intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 2}
    return tiny.save("qwen3_moe", tmp_path_factory.mktemp("mixture"), **sizes, initializer_range=0.1)


def test_same_curve_on_every_engine(wide: str, mixture: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    """Mixtures' blocks are recomputed on two ranks, which must not matter; bfloat16 rounds, its bits stay."""
    kinds = {"nf4": wide, "int8": wide, "nf4-experts": mixture, "nf4-bfloat16": wide}
    runs: dict[tuple, Path] = {}
    for world in (1, 2):
        cases: list[dict[str, Any]] = []
        for (kind, model), engine in itertools.product(kinds.items(), ENGINES):
            folder = tmp_path / f"{kind}-{engine}-{world}"
            config = token_run(folder, model, rows[0], engine, world, 2, model == wide, {"name": "qlora", "r": 4})
            config["model"]["quantization"] = kind.split("-")[0]
            config["model"]["dtype"] = "bfloat16" if "bfloat16" in kind else "float32"
            config["model"]["gradient_checkpointing"] = model == mixture and world == 2
            config["train"]["max_steps"] = STEPS
            if "bfloat16" in kind and world == 1 and engine != "ddp":
                continue
            cases.append({"config": config, "export": world == 2})
            runs[kind, engine, world] = folder
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)
    for (kind, engine, world), folder in runs.items():
        curve = [v for m in metrics_of(folder) for v in (m["train/loss"], m["train/grad_norm"])]
        reference = [v for m in metrics_of(runs[kind, "ddp", 1]) for v in (m["train/loss"], m["train/grad_norm"])]
        tolerance = 0.1 if "bfloat16" in kind else 1e-5
        assert curve == pytest.approx(reference, rel=tolerance), (kind, engine, world)
        assert curve[-2] < curve[0], "the loss should fall"
        assert frozen_bytes(folder) == frozen_bytes(runs[kind, "ddp", 1]), (kind, engine, world)
        held = SafeReader(folder / "checkpoints" / f"step-{STEPS}").read_metadata().state_dict_metadata
        assert held and all("lora_" in name for name in held), "weights and moments of the adapters alone"
    losses = {s: metrics_of(runs[s, "ddp", 1])[0]["train/loss"] for s in ("nf4", "int8")}
    assert losses["nf4"] != losses["int8"]
    experts = torch.load(runs["nf4-experts", "fsdp", 2] / "all_weights.pt", weights_only=True)
    assert all(p.ndim == 1 for n, p in experts.items() if "experts." in n), "packed"


def test_merged_into_the_whole_base(
    wide: str, rows: tuple[str, list[dict]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = token_run(tmp_path / "run", wide, rows[0], "ddp", 1, 1, False, {"name": "qlora", "r": 4})
    config["train"]["max_steps"] = 3
    spawn(1, "tests.dist.cases:run_cases", [{"config": config, "export": True}])
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    export_again([str(tmp_path / "run"), f"out={tmp_path / 'again'}"])
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("adapter on the")]
    own, whole_base = (float(line.split("relative ")[1]) for line in lines)
    assert own < 1e-5 < 1e-2 < whole_base and "nf4 base" in lines[0] and "base model in float32" in lines[1]
    assert f"relative {lines[1].split('relative ')[1]}" in card and "on the nf4 base model" in card
    export_again([str(tmp_path / "run"), "merge=true", f"out={tmp_path / 'merged'}"])
    said = capsys.readouterr().out
    assert "instead of the nf4 base model" in said and "merged in memory" in said
    whole = LlamaForCausalLM.from_pretrained(tmp_path / "merged")
    base = LlamaForCausalLM.from_pretrained(wide)
    change = whole.model.layers[0].self_attn.q_proj.weight - base.model.layers[0].self_attn.q_proj.weight
    assert 0 < float(change.detach().norm()) < float(base.model.layers[0].self_attn.q_proj.weight.detach().norm())
