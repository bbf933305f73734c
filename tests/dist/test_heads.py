"""A head for labels on every shape of model, under every method and engine: one curve, saved with the adapter."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForQuestionAnswering, AutoModelForSequenceClassification, AutoTokenizer

from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import DECODERS, ENCODERS, save_model
from tests.dist.cases import metrics_of
from tests.runs import labelled_run
from tests.samples import LABELS, write_labelled_rows, write_questions

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

SHAPES = (*ENCODERS, *DECODERS)
ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "freeze": {"name": "freeze", "num_layers": 0},
    "bitfit": {"name": "bitfit"},
    "ln_tuning": {"name": "ln_tuning"},
    "adapter": {"name": "adapter", "reduction_factor": 4},
    "lora": {"name": "lora", "r": 4},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "prefix": {"name": "prefix", "num_virtual_tokens": 4},
    "p_tuning": {"name": "p_tuning", "num_virtual_tokens": 4},
}
VIRTUAL = ("prompt", "prefix", "p_tuning")
REFUSED = {("gpt2", "prompt"), ("gpt2", "p_tuning")}  # see tests/unit/method/test_virtual_tokens.py
BIASED = {"bert", "distilbert", "roberta", "gpt2", "opt", "bloom"}
PARITY = {"rel": 1e-5}


def grid() -> list[tuple[str, str, str, int]]:
    """Shape, method, engine, world size: every method on an encoder and a decoder, LoRA and full on every shape."""
    found = []
    for shape in SHAPES:
        for method in METHODS if shape in ("bert", "gpt2") else ("full", "lora"):
            if (shape, method) in REFUSED:
                continue
            every = shape in ("bert", "gpt2") and method in ("full", "lora")
            engines = ENGINES if every else ("fsdp", "zero3") if method in VIRTUAL else ("ddp", "fsdp", "zero3")
            found += [*((shape, method, engine, 2) for engine in engines), (shape, method, "ddp", 1)]
    return found


QUESTIONS = {"name": "question_answering", "max_length": 24, "doc_stride": 6, "n_best": 3}
ASKED = [
    ("questions", method, engine, world)
    for method in ("full", "lora")
    for engine, world in (("ddp", 2), ("fsdp", 2), ("zero3", 2), ("ddp", 1))
]
GRID = [*grid(), *ASKED]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("labelled") / "rows.jsonl"
    write_labelled_rows(path)
    write_questions(path.with_name("questions.jsonl"))
    return path


@pytest.fixture(scope="module")
def shapes(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    return {shape: save_model(shape, tmp_path_factory.mktemp(shape)) for shape in SHAPES}


@pytest.fixture(scope="module")
def runs(shapes: dict[str, str], data: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    folders: dict[tuple, Path] = {}
    for world in (1, 2):
        top = tmp_path_factory.mktemp(f"world-{world}")
        cases = []
        for key in GRID:
            shape, method, engine, wanted = key
            if wanted == world:
                folders[key] = top / f"{shape}-{method}-{engine}"
                asked = shape == "questions"
                rows, model = (data.with_name("questions.jsonl"), "bert") if asked else (data, shape)
                changes = {"method": METHODS[method], **({"task": QUESTIONS} if asked else {})}
                config = labelled_run(folders[key], shapes[model], rows, engine, world, **changes)
                cases.append({"config": config, "export": engine in ("ddp", "zero3")})
        spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=800)
    return folders


def curve(run_dir: Path) -> list[float]:
    return [value for m in metrics_of(run_dir) for value in (m["train/loss"], m["train/grad_norm"])]


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]


@pytest.mark.parametrize("shape", [*SHAPES, "questions"])
def test_one_curve_and_one_score_for_all_engines_and_sizes(shape: str, runs: dict[tuple, Path]) -> None:
    for method in METHODS:
        same = {key: run for key, run in runs.items() if key[:2] == (shape, method)}
        if not same:
            continue
        alone = same[shape, method, "ddp", 1]
        losses = curve(alone)[::2]
        assert losses[-1] < losses[0], (method, losses)
        for key, run_dir in same.items():
            assert curve(run_dir) == pytest.approx(curve(alone), **PARITY), key
            for found, wanted in zip(evaluations(run_dir), evaluations(alone), strict=True):
                assert found == pytest.approx(wanted, rel=1e-5, abs=1e-6), key


def test_the_export_names_the_labels_and_gives_the_trained_head(
    runs: dict[tuple, Path], shapes: dict[str, str]
) -> None:
    for shape in SHAPES:
        folder = runs[shape, "full", "zero3", 2] / "model"
        model = AutoModelForSequenceClassification.from_pretrained(folder)
        assert [model.config.id2label[i] for i in range(3)] == LABELS
        settings = json.loads((runs[shape, "lora", "zero3", 2] / "model" / "adapter_config.json").read_text())
        assert settings["task_type"] == "SEQ_CLS" and settings["modules_to_save"]


def test_the_export_of_questions_has_the_trained_head(runs: dict[tuple, Path], shapes: dict[str, str]) -> None:
    """As transformers and peft open it: the very weights that the engines held at the end."""
    for method, engine in (("full", "ddp"), ("full", "zero3"), ("lora", "ddp"), ("lora", "zero3")):
        run_dir = runs["questions", method, engine, 2]
        model = AutoModelForQuestionAnswering.from_pretrained(
            shapes["bert"] if method == "lora" else run_dir / "model", num_labels=2
        )
        if method == "lora":
            model = peft.PeftModel.from_pretrained(model, run_dir / "model")
        found, held = model.state_dict(), torch.load(run_dir / "weights.pt", weights_only=True)
        heads = [name for name in held if "qa_outputs" in name]
        assert len(heads) == 2 and len(held) > 10
        for name, tensor in held.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0, msg=f"{method} {engine} {name}")


@pytest.mark.parametrize("shape", ["bert", "gpt2"])
def test_it_is_what_transformers_trains(
    shape: str, runs: dict[tuple, Path], shapes: dict[str, str], data: Path
) -> None:
    """A plain loop over transformers' own loss from the same start: weighted as torch's weighted mean."""
    folder = runs[shape, "full", "ddp", 1]
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    tokenizer = AutoTokenizer.from_pretrained(shapes[shape])
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(shapes[shape], num_labels=3, pad_token_id=pad)
    counts = torch.tensor([sum(row["label"] == i for row in rows) for i in range(3)], dtype=torch.float32)
    weights = counts.sum() / (3 * counts)
    decayed = [p for p in model.parameters() if p.ndim > 1]
    plain = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": decayed, "weight_decay": 0.1}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=3e-3)
    losses = []
    for step in range(6):
        chosen = [rows[(step * 8 + i) % len(rows)] for i in range(8)]
        encoded = [tokenizer(row["text"])["input_ids"] for row in chosen]
        longest = max(map(len, encoded))
        ids = torch.tensor([row + [pad] * (longest - len(row)) for row in encoded])
        mask = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in encoded])
        logits = model(input_ids=ids, attention_mask=mask).logits
        target = torch.tensor([row["label"] for row in chosen])
        loss = torch.nn.functional.cross_entropy(logits, target, weights)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = 3e-3 * (1 - step / 6)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert curve(folder)[::2] == pytest.approx(losses, rel=1e-5)


def test_the_best_step_is_exported_where_it_was_asked_for(shapes: dict[str, str], data: Path, tmp_path: Path) -> None:
    """A rate at which the score falls again; engines hold the best step's weights afterwards."""
    cases = []
    for engine in ("ddp", "fsdp", "zero3"):
        config = labelled_run(tmp_path / engine, shapes["bert"], data, engine, 2)
        config["optim"] |= {"learning_rate": 0.3, "lr_scheduler_type": "constant"}
        config["train"] |= {"eval_steps": 1, "load_best_model_at_end": True, "metric_for_best_model": "f1"}
        cases.append({"config": config, "export": True})
    spawn(2, "tests.dist.cases:run_cases", cases, timeout_s=300)
    for engine in ("ddp", "fsdp", "zero3"):
        _, *during, last = evaluations(tmp_path / engine)
        scores = [metrics["eval/f1"] for metrics in during]
        best = (tmp_path / engine / "checkpoints" / "best").resolve().name
        assert best == f"step-{1 + scores.index(max(scores))}" != "step-6", (engine, scores)
        assert last["eval/f1"] == pytest.approx(max(scores)) and last != during[-1], engine
