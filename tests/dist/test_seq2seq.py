"""An encoder-decoder under every kind of method, on sharded and unsharded engines: one curve, one set of scores."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer, T5Config, T5ForConditionalGeneration

from dist_ft.errors import RequestError
from dist_ft.families import METHODS
from dist_ft.method.adapter import load_adapter
from dist_ft.schema_method import BitfitConfig
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.dist.heads import WORDS, make_model

pytestmark = [pytest.mark.dist, pytest.mark.timeout(900)]

CHOICES: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4},
    "tokens": {"name": "lora", "r": 4},  # with added ones
    "adapter": {"name": "adapter", "reduction_factor": 4},
    "ia3": {"name": "ia3"},
}
ENGINES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]
GRID = [(method, engine, world) for method in CHOICES for engine, world in ENGINES]
NEW_TOKEN = "<|tool|>"
MAX_NEW_TOKENS = 6


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A T5 without dropout and with T5 1.1's untied head; the words of other tests."""
    folder = tmp_path_factory.mktemp("t5")
    make_model("bert", folder)
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
    ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 2}
    T5ForConditionalGeneration(T5Config(**sizes, **ends, dropout_rate=0.0)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(folder, eos_token="[SEP]").save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def runs(base: str, tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, str, int], Path]:
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
            method, engine, world = case
            if world != wanted:
                continue
            folders[case] = top / f"{method}-{engine}-{world}"
            config = {
                "run_name": "r",
                "output_dir": str(folders[case]),
                "model": {"name_or_path": base, "add_tokens": [NEW_TOKEN] if method == "tokens" else []},
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
                "track": {"wandb": "off"},
                "launch": {"name": "local", "workers_per_node": world},
            }
            cases.append({"config": config, "export": True})
        spawn(wanted, "tests.dist.cases:run_cases", cases, timeout_s=800)
    return folders


def evaluations(run_dir: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]


@pytest.mark.parametrize("method", CHOICES)
def test_one_curve_and_the_same_generated_texts(method: str, runs: dict[tuple[str, str, int], Path]) -> None:
    alone = runs[method, "ddp", 1]
    wanted = {name: [line[name] for line in metrics_of(alone)] for name in ("train/loss", "train/grad_norm")}
    assert wanted["train/loss"][-1] < wanted["train/loss"][0]
    for engine, world in ENGINES:
        found = metrics_of(runs[method, engine, world])
        for name, values in wanted.items():
            assert [line[name] for line in found] == pytest.approx(values, rel=1e-5), (engine, name)
        for one, other in zip(evaluations(runs[method, engine, world]), evaluations(alone), strict=True):
            assert "eval/chrf" in one and one == pytest.approx(other, rel=1e-5, abs=1e-6), engine


@pytest.mark.parametrize("method", CHOICES)
def test_only_what_should_learn_does_and_exports_load_by_hand(
    method: str, runs: dict[tuple[str, str, int], Path], base: str
) -> None:
    before = dict(AutoModelForSeq2SeqLM.from_pretrained(base).named_parameters())
    marks = {"lora": ("lora_",), "tokens": ("lora_", "tokens_delta"), "ia3": ("ia3_",), "adapter": ("adapter",)}
    for engine in ("ddp", "fsdp", "zero3"):
        folder = runs[method, engine, 2]
        learned = torch.load(folder / "weights.pt", weights_only=True)
        if method == "full":
            loaded: Any = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
            assert all(torch.equal(p, learned[name]) for name, p in loaded.named_parameters())
            assert not any(torch.equal(p, before[name]) for name, p in loaded.named_parameters())
            continue
        assert all(any(mark in name for mark in marks[method]) for name in learned), sorted(learned)[:3]
        plain = AutoModelForSeq2SeqLM.from_pretrained(base)
        if method == "tokens":
            plain.resize_token_embeddings(97, mean_resizing=False)
        folder = folder / "model"
        loaded = load_adapter(plain, folder) if method == "adapter" else peft.PeftModel.from_pretrained(plain, folder)
        parameters = dict(loaded.named_parameters())
        assert all(torch.equal(parameters[name], tensor) for name, tensor in learned.items())


def test_the_score_is_that_of_texts_that_transformers_generates(
    runs: dict[tuple[str, str, int], Path], base: str
) -> None:
    folder = runs["full", "zero3", 2]
    model = AutoModelForSeq2SeqLM.from_pretrained(folder / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    rows = [json.loads(line) for line in (folder.parent / "rows.jsonl").read_text().splitlines()]
    right = 0
    for row in rows:
        ids = torch.tensor([tokenizer(row["source"])["input_ids"]])
        output = model.generate(ids, max_new_tokens=MAX_NEW_TOKENS, do_sample=False, num_beams=1)
        right += tokenizer.decode(output[0], skip_special_tokens=True).strip() == row["target"]
    assert evaluations(folder)[-1]["eval/exact_match"] == pytest.approx(right / len(rows))


def test_a_t5_has_no_biases_to_learn(base: str) -> None:
    with pytest.raises(RequestError, match="has no biases, so bitfit would train nothing"):
        METHODS["bitfit"](BitfitConfig(name="bitfit")).apply(AutoModelForSeq2SeqLM.from_pretrained(base))
