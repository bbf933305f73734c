"""Preferences and rewards from pairs: one curve on every engine and size, TRL's own, and the same after a stop."""

from __future__ import annotations

import copy
import json
import math
import random
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn.functional import log_softmax, logsigmoid
from transformers import AutoTokenizer, LlamaForCausalLM

from dist_ft.assess.evaluate import evaluate_run
from dist_ft.config.plan import read_plan
from dist_ft.prepare import prepare
from dist_ft.process.options import EvaluateOptions
from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import WORDS, save_model
from tests.dist.cases import metrics_of
from tests.runs import labelled_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

STEPS, BATCH, STOP, RATE = 6, 8, 3, 3e-3
TASKS: dict[str, dict[str, Any]] = {
    "preference": {"name": "preference", "max_length": 32, "beta": 0.5},
    "ipo": {"name": "preference", "max_length": 32, "loss_type": "ipo"},
    "reward": {"name": "reward", "max_length": 32, "center_rewards_coefficient": 0.01},
}
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4},
    "pissa": {"name": "lora", "r": 4, "init_lora_weights": "pissa"},
}
GRID = [
    *((t, m, e, 2) for t, m in (("preference", "full"), ("preference", "lora")) for e in ("ddp", "fsdp", "zero3")),
    *(("reward", "lora", engine, 2) for engine in ("ddp", "fsdp", "zero3")),
    *(("preference", method, "ddp", 1) for method in METHODS),
    ("preference", "pissa", "fsdp", 2),
    ("ipo", "full", "ddp", 1),
    ("reward", "lora", "ddp", 1),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("llama", tmp_path_factory.mktemp("model"), "AutoModelForCausalLM", initializer_range=0.2)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Prompts of 1 to 10 words with answers of 1 to 9; the chosen one begins with another word than the rejected."""
    dice = random.Random(5)
    path = tmp_path_factory.mktemp("pairs") / "rows.jsonl"
    lines = []
    for _ in range(37):
        prompt, *answers = (" ".join(dice.choices(WORDS[2:], k=dice.randint(1, most))) for most in (10, 8, 8))
        row = {"prompt": prompt + " ", "chosen": f"w0 {answers[0]}", "rejected": f"w1 {answers[1]}"}
        lines.append(json.dumps(row) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def case(folder: Path, model: str, rows: Path, key: tuple[str, str, str, int], **more: Any) -> dict[str, Any]:
    task, method, engine, world = key
    config = labelled_run(folder, model, rows, engine, world, method=METHODS[method], task=TASKS[task])
    config["optim"] = {"learning_rate": RATE, "weight_decay": 0.0, "lr_scheduler_type": "constant"}
    return {"config": config, **more}


@pytest.fixture(scope="module")
def runs(model: str, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    """The grid, and a LoRA run on two FSDP ranks that is stopped and goes on alone under DDP (`resumed`)."""
    folders: dict[tuple, Path] = {}
    tops = {world: tmp_path_factory.mktemp(f"world-{world}") for world in (2, 1)}
    stopped = tops[2] / "stopped"
    for world, top in tops.items():
        cases = []
        for key in GRID:
            if key[-1] == world:
                folders[key] = top / "-".join(key[:3])
                cases.append(case(folders[key], model, rows, key, export=key[2] == "zero3" or world == 1))
        if world == 2:
            cases.append(case(stopped, model, rows, ("preference", "lora", "fsdp", 2), stop_after=STOP))
        else:
            folders["resumed",] = top / "resumed"
            shutil.copytree(stopped, folders["resumed",], symlinks=True)
            cases.append(case(folders["resumed",], model, rows, ("preference", "lora", "ddp", 1)))
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=250)
    folders["stopped",] = stopped
    return folders


def curve(run_dir: Path) -> list[float]:
    return [value for m in metrics_of(run_dir) for value in (m["train/loss"], m["train/grad_norm"])]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]


def test_one_curve_for_all_engines_and_sizes(runs: dict[tuple, Path]) -> None:
    for key in GRID:
        alone = runs[(*key[:2], "ddp", 1)]
        assert curve(runs[key]) == pytest.approx(curve(alone), rel=1e-5), key
        for found, wanted in zip(evaluations(runs[key]), evaluations(alone), strict=True):
            assert found == pytest.approx(wanted, rel=1e-5, abs=1e-5), key
        before, after = evaluations(runs[key])
        assert after["eval/loss"] < before["eval/loss"]
        name = "eval/accuracy" if key[0] == "reward" else "eval/rewards/accuracies"
        assert after[name] > 0.9, (key, after)


def test_a_stopped_run_keeps_its_reference_and_its_curve(runs: dict[tuple, Path]) -> None:
    whole, resumed = runs["preference", "lora", "ddp", 1], runs["resumed",]
    assert [m["step"] for m in metrics_of(resumed)] == list(range(1, STEPS + 1))
    assert curve(resumed) == pytest.approx(curve(whole), rel=1e-5)
    kept, before = (load_file(runs[name,] / "reference.safetensors") for name in ("resumed", "stopped"))
    assert kept.keys() == before.keys()
    assert all(torch.equal(kept[name], before[name]) for name in before)


@pytest.mark.parametrize("method", METHODS)
def test_eval_tells_the_runs_own_numbers_with_the_kept_reference_and_without(
    method: str, runs: dict[tuple, Path], tmp_path: Path
) -> None:
    """Without it the base gives it: PiSSA moves weights, and its model still starts as the base."""
    config = read_plan(runs["preference", method, "ddp", 1]).config
    logged = evaluations(runs["preference", method, "ddp", 1])[-1]
    run_dir = shutil.copytree(runs["preference", method, "ddp", 1], tmp_path / "run", symlinks=True)
    for wanted in ({"kept"}, set()):
        if not wanted:
            (run_dir / "reference.safetensors").unlink()
        found = evaluate_run(config, prepare(config), run_dir, EvaluateOptions(baseline=True))  # type: ignore[call-arg]
        told = {f"eval/{name}": value for name, value in found["export"].metrics.items()}
        assert told == pytest.approx(logged, rel=1e-4, abs=1e-4)
        assert found["base"].metrics["loss"] == pytest.approx(math.log(2), abs=1e-5)
        assert [row["sample"] for row in found["export"].predictions] == list(range(37))
        assert (run_dir / "reference.safetensors").exists()


def train_plainly(model: str, rows: Path, kind: str) -> list[float]:
    """Losses and norms of a loop over transformers' model beside a frozen copy of it, a sequence at a time."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    start = copy.deepcopy(policy).requires_grad_(False)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=RATE, weight_decay=0.0)
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    found = []
    for step in range(STEPS):
        losses = []
        for i in range(BATCH):
            row = pairs[(step * BATCH + i) % len(pairs)]
            ratios = []
            for answer in (row["chosen"], row["rejected"]):
                prompt, ids = (tokenizer(text)["input_ids"] for text in (row["prompt"], row["prompt"] + answer))
                ids = torch.tensor([[*ids, tokenizer.eos_token_id]])
                logps = [log_softmax(m(input_ids=ids).logits[0, :-1], dim=-1) for m in (policy, start)]
                own, other = (p.gather(1, ids[0, 1:, None])[len(prompt) - 1 :, 0] for p in logps)
                ratios.append((own - other).mean() if kind == "ipo" else (own - other).sum())
            margin = ratios[0] - ratios[1]
            losses.append((margin - 1 / 0.2) ** 2 if kind == "ipo" else -logsigmoid(0.5 * margin))
        loss = torch.stack(losses).mean()
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(policy.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        found += [loss.item(), float(norm)]
    return found


@pytest.mark.parametrize("kind", ["preference", "ipo"])
def test_it_is_what_a_second_model_gives(kind: str, runs: dict[tuple, Path], model: str, rows: Path) -> None:
    assert curve(runs[kind, "full", "ddp", 1]) == pytest.approx(train_plainly(model, rows, kind), rel=1e-5)


def test_it_is_what_trl_trains(runs: dict[tuple, Path], model: str, rows: Path, tmp_path: Path) -> None:
    trl = pytest.importorskip("trl")
    from datasets import Dataset

    found: list[float] = []

    class InOrder(trl.DPOTrainer):
        def _get_train_sampler(self, *args: Any) -> Any:
            return torch.utils.data.SequentialSampler(self.train_dataset)

        def log(self, logs: dict[str, float], *args: Any) -> None:
            found.extend([logs["loss"], logs["grad_norm"]] if "loss" in logs else [])

    arguments = trl.DPOConfig(
        str(tmp_path), max_steps=4, per_device_train_batch_size=BATCH, learning_rate=RATE, lr_scheduler_type="constant",
        beta=0.5, logging_steps=1, report_to=[], save_strategy="no", use_cpu=True, bf16=False, max_grad_norm=1.0,
        weight_decay=0.0, gradient_checkpointing=False, dataloader_pin_memory=False, disable_tqdm=True,
    )  # fmt: skip
    pairs = [json.loads(line) for line in rows.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.pad_token = "[PAD]"
    policy = LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)
    InOrder(policy, args=arguments, train_dataset=Dataset.from_list(pairs), processing_class=tokenizer).train()
    assert found == pytest.approx(curve(runs["preference", "full", "ddp", 1])[:8], rel=1e-5)
