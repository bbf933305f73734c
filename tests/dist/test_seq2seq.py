"""Encoder-decoders under every kind of method, on sharded and unsharded engines: one curve, one set of scores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

from dist_ft.method.adapter import load_adapter
from dist_ft.task.scores.texts import measure
from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import WORDS, save_model
from tests.dist.cases import metrics_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

CHOICES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4},
    "tokens": {"name": "lora", "r": 4},  # with added ones
    "adapter": {"name": "adapter", "reduction_factor": 4},
    "ia3": {"name": "ia3"},
    "prompt": {"name": "prompt", "num_virtual_tokens": 4},
    "prefix": {"name": "prefix", "num_virtual_tokens": 4},
}
MARKS = {"lora": ("lora_",), "tokens": ("lora_", "tokens_delta"), "ia3": ("ia3_",), "adapter": ("adapter",)}
VIRTUAL = ("prompt", "prefix")
OF_EACH = {"t5": ("full", "tokens", "ia3", "prompt", "prefix"), "bart": ("full", "lora", "tokens", "adapter")}
PAIRS = [(shape, method) for shape, methods in OF_EACH.items() for method in methods]
ENGINES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]
GRID = [(*pair, engine, world) for pair in PAIRS for engine, world in ENGINES]
NEW_TOKEN = "<|tool|>"
MAX_NEW_TOKENS = 6
AUTO_CLASS = "AutoModelForSeq2SeqLM"
# What a folder says of generating, every rank must do. As that of facebook/bart-base says, texts begin with a token.
GENERATION = {"forced_bos_token_id": 1, "no_repeat_ngram_size": 1}
Key = tuple[str, str, str, int]  # shape, method, engine, world size


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Models without dropout, with the words of other tests: T5, and BART with biased logits; both are tied."""
    folders = {shape: save_model(shape, tmp_path_factory.mktemp(shape), AUTO_CLASS) for shape in ("t5", "bart")}
    bart: Any = AutoModelForSeq2SeqLM.from_pretrained(folders["bart"])
    AutoTokenizer.from_pretrained(folders["bart"]).save_pretrained(folders["bart"] + "-biased")
    folders["bart"] += "-biased"
    bart.final_logits_bias.copy_(torch.linspace(-1, 1, 96)[torch.randperm(96)])  # a buffer, which no method trains
    for name, value in GENERATION.items():
        setattr(bart.generation_config, name, value)
    bart.save_pretrained(folders["bart"])
    return folders


@pytest.fixture(scope="module")
def runs(bases: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> dict[Key, Path]:
    top = tmp_path_factory.mktemp("seq2seq")
    dice = random.Random(5)
    rows = []
    for i in range(19):  # of uneven lengths; some with the new token, which other runs read as unknown
        source = [NEW_TOKEN if i % 3 == 0 else WORDS[0], *dice.choices(WORDS, k=dice.randint(1, 12))]
        rows.append({"source": " ".join(source), "target": " ".join(source[1:3])})
    data = top / "rows.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    folders = {}
    for wanted in (1, 2):
        cases = []
        for case in GRID:
            shape, method, engine, world = case
            if world != wanted:
                continue
            folders[case] = top / "-".join(map(str, case))
            config = {
                "run_name": "r",
                "output_dir": str(folders[case]),
                "model": {
                    "dtype": "float32",
                    "name_or_path": bases[shape],
                    "add_tokens": [NEW_TOKEN] if method == "tokens" else [],
                },
                "task": {
                    "name": "seq2seq",
                    "max_length": 32,
                    "max_target_length": 16,
                    "metrics": ["chrf", "exact_match"],
                    "max_new_tokens": MAX_NEW_TOKENS,
                },
                "data": {
                    "train": str(data),
                    "validation": str(data),
                    "shuffle": False,
                    "cache_dir": str(top / "cache"),
                },
                "method": CHOICES[method],
                "engine": {"name": engine},
                "optim": {"learning_rate": 1e-2, "weight_decay": 0.1, "lr_scheduler_type": "linear"},
                "train": {"max_steps": 5, "global_batch_size": 8, "per_device_train_batch_size": 4 // world},
                "track": {"wandb": "off", "report": False},
                "launch": {"name": "local", "workers_per_node": world},
            }
            cases.append({"config": config, "export": True})
        spawn(wanted, "tests.dist.cases:run_cases", cases, timeout_s=800)
    return folders


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]


@pytest.mark.parametrize(("shape", "method"), PAIRS)
def test_one_curve_and_the_same_generated_texts(shape: str, method: str, runs: dict[Key, Path]) -> None:
    alone = runs[shape, method, "ddp", 1]
    wanted = {name: [line[name] for line in metrics_of(alone)] for name in ("train/loss", "train/grad_norm")}
    first, *_, last = evaluations(alone)
    assert last["eval/loss"] < first["eval/loss"]
    for engine, world in ENGINES:
        where = (engine, world)
        run_dir = runs[shape, method, engine, world]
        found = metrics_of(run_dir)
        for name, values in wanted.items():
            assert [line[name] for line in found] == pytest.approx(values, rel=1e-5), (where, name)
        for one, other in zip(evaluations(run_dir), evaluations(alone), strict=True):
            assert "eval/chrf" in one and one == pytest.approx(other, rel=1e-5, abs=1e-6), where


@pytest.mark.parametrize(("shape", "method"), PAIRS)
def test_only_what_should_learn_does_and_exports_load_by_hand(
    shape: str, method: str, runs: dict[Key, Path], bases: dict[str, str]
) -> None:
    before = AutoModelForSeq2SeqLM.from_pretrained(bases[shape])
    for engine in ("ddp", "fsdp", "zero3"):
        folder = runs[shape, method, engine, 2]
        learned = torch.load(folder / "weights.pt", weights_only=True)
        loaded = load_by_hand(method, folder / "model", bases[shape])
        parameters = dict(loaded.named_parameters())
        if method == "full":
            assert learned.keys() == parameters.keys()
            assert not any(torch.equal(p, learned[name]) for name, p in before.named_parameters())
        elif method in VIRTUAL:  # the export has what the encoder gives
            assert all("prompt_encoder" in name for name in learned)
        else:
            assert all(any(mark in name for mark in MARKS[method]) for name in learned), sorted(learned)[:3]
        assert all(torch.equal(parameters[name], tensor) for name, tensor in learned.items())
        plain = loaded.get_base_model() if hasattr(loaded, "get_base_model") else loaded
        if method != "tokens":  # whose embeddings peft wraps
            assert plain.get_input_embeddings().weight is plain.get_output_embeddings().weight, engine
        buffers = dict(plain.named_buffers())
        assert all(torch.equal(buffers[name][..., :96], tensor) for name, tensor in before.named_buffers()), engine


def load_by_hand(method: str, folder: Path, base: str) -> Any:
    """An export, as transformers and peft (or the three lines of a bottleneck adapter) load it."""
    if method == "full":
        return AutoModelForSeq2SeqLM.from_pretrained(folder)
    plain = AutoModelForSeq2SeqLM.from_pretrained(base)
    if method == "tokens":
        plain.resize_token_embeddings(97, mean_resizing=False)
    return load_adapter(plain, folder) if method == "adapter" else peft.PeftModel.from_pretrained(plain, folder)


@pytest.mark.parametrize(
    ("shape", "method", "engine"),
    [(s, m, e) for s, m in PAIRS if m != "tokens" for e in ("zero3", "fsdp") if m == "full" or e == "zero3"],
)
def test_the_score_is_that_of_texts_that_transformers_generates(
    shape: str, method: str, engine: str, runs: dict[Key, Path], bases: dict[str, str]
) -> None:
    """Row by row, without padding."""
    folder = runs[shape, method, engine, 2]
    model = load_by_hand(method, folder / "model", bases[shape]).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text().splitlines()]
    texts = []
    for row in rows:
        ids = torch.tensor([tokenizer(row["source"])["input_ids"]])
        options = {"max_new_tokens": MAX_NEW_TOKENS, "do_sample": False, "num_beams": 1}
        output = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), **options)
        texts.append(tokenizer.decode(output[0], skip_special_tokens=True).strip())
    wanted = measure(texts, [[row["target"]] for row in rows], ["chrf", "exact_match"])
    found = evaluations(folder)[-1]
    assert {name: found[f"eval/{name}"] for name in wanted} == pytest.approx(wanted)
    assert shape == "t5" or len(set(texts)) > 3, texts
