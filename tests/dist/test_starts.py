"""Starts that move a part of the base: plain peft's curve on every engine, an adapter for the base, going on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM

from dist_ft.config.plan import START_FILE
from dist_ft.export.merge import main as export_again
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.oracle import steps_of
from tests.runs import BATCH, LEARNING_RATE, MAX_NORM, WEIGHT_DECAY, token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
WORLDS = {1: ("ddp", "zero3"), 2: ENGINES}
KINDS = ("pissa", "olora")
STEPS, STOP = 6, 3
IDS = torch.arange(3, 30)[None]


def case(folder: Path, model: str, data: str, engine: str, world: int, kind: str, **more: Any) -> dict[str, Any]:
    method = {"name": "lora", "r": 4, "lora_alpha": 8, "init_lora_weights": kind}
    config = token_run(folder, model, data, engine, world, 2, False, method)
    config["train"]["max_steps"] = STEPS
    return {"config": config, **more}


def run(world: int, cases: list[dict[str, Any]]) -> None:
    spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=600)


def curve(folder: Path) -> list[float]:
    return [value for m in metrics_of(folder) for value in (m["train/loss"], m["train/grad_norm"])]


def logits_of(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits


def train_by_peft(folder: str, rows: list[dict], kind: str) -> tuple[list[float], torch.Tensor]:
    """Losses and norms of plain peft and plain torch, and the trained model's logits."""
    base = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    settings = peft.LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=kind)
    model = peft.get_peft_model(base, settings).train()
    learned = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(learned, lr=LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 - step / STEPS)
    values = []
    for taken in steps_of(rows, batch=BATCH, steps=STEPS, max_length=None):
        supervised = sum(label != -100 for row in taken for label in row["labels"][1:])
        total = 0.0
        for row in taken:
            logits = model(input_ids=torch.tensor([row["input_ids"]]), use_cache=False).logits[0]
            labels = torch.tensor(row["labels"])
            loss = cross_entropy(logits[:-1], labels[1:], reduction="sum", ignore_index=-100) / supervised
            loss.backward()
            total += loss.item()
        values += [total, float(torch.nn.utils.clip_grad_norm_(learned, MAX_NORM))]
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return values, logits_of(model)


@pytest.fixture(scope="module")
def runs(model: str, rows: tuple[str, list[dict]], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    top = tmp_path_factory.mktemp("starts")
    folders = {(k, e, w): top / f"{k}-{e}-{w}" for k in KINDS for w, engines in WORLDS.items() for e in engines}
    for world in (1, 2):
        here = {key: folder for key, folder in folders.items() if key[2] == world}
        run(world, [case(f, model, rows[0], e, w, k, export=w == 2) for (k, e, w), f in here.items()])
    return folders


@pytest.mark.parametrize("kind", KINDS)
def test_the_curve_and_the_export_are_plain_pefts(
    kind: str, runs: dict[tuple, Path], model: str, rows: tuple[str, list[dict]]
) -> None:
    expected, logits = train_by_peft(model, rows[1], kind)
    assert expected[-2] < expected[0] - 1e-3
    for world, engines in WORLDS.items():
        for engine in engines:
            assert curve(runs[kind, engine, world]) == pytest.approx(expected, rel=1e-5), (engine, world)
    for engine in ENGINES:
        exported = runs[kind, engine, 2] / "model"
        loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(exported))
        torch.testing.assert_close(logits_of(loaded), logits, rtol=0, atol=1e-3)
        trained = torch.load(runs[kind, engine, 2] / "weights.pt", weights_only=True)
        assert trained and all("lora_" in name for name in trained), "the checkpoint's are the adapter's alone"


@pytest.mark.parametrize("kind", KINDS)
def test_exported_from_a_checkpoint_and_merged(kind: str, runs: dict[tuple, Path], model: str, tmp_path: Path) -> None:
    folder = runs[kind, "zero3", 2]
    words = {"again": ["checkpoint=latest"], "merged": ["merge=true"], "both": ["merge=true", "checkpoint=latest"]}
    for name, options in words.items():
        export_again([str(folder), *options, f"out={tmp_path / name}"])
    one, two = (load_file(f / "adapter_model.safetensors") for f in (folder / "model", tmp_path / "again"))
    assert one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)
    loaded = peft.PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(model), str(folder / "model"))
    for name in ("merged", "both"):
        merged = AutoModelForCausalLM.from_pretrained(tmp_path / name)
        torch.testing.assert_close(logits_of(merged), logits_of(loaded), rtol=0, atol=1e-4)


def test_goes_on_under_any_engine(
    runs: dict[tuple, Path], model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    """Beside its checkpoints the run keeps its start; that of another folder comes with the checkpoint."""
    begun = tmp_path / "begun"
    run(2, [case(begun, model, rows[0], "zero3", 2, "pissa", stop_after=STOP)])
    before = load_file(begun / START_FILE)
    expected = curve(runs["pissa", "ddp", 1])
    for world, engines in WORLDS.items():
        cases = []
        for engine in engines:
            folder = tmp_path / f"{engine}-{world}"
            shutil.copytree(begun, folder, symlinks=True)
            cases.append(case(folder, model, rows[0], engine, world, "pissa", export=world == 2))
        named = case(tmp_path / f"named-{world}", model, rows[0], "fsdp", world, "pissa", export=True)
        named["config"]["train"]["resume"] = str(begun / "checkpoints" / f"step-{STOP}")
        run(world, [*cases, named])
        for engine in engines:
            assert curve(tmp_path / f"{engine}-{world}") == pytest.approx(expected, rel=1e-5), (engine, world)
        assert curve(tmp_path / f"named-{world}") == pytest.approx(expected[2 * STOP :], rel=1e-5), world
        kept = load_file(tmp_path / f"named-{world}" / START_FILE)
        assert all(torch.equal(kept[name], before[name]) for name in before)
