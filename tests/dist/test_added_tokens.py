"""Added tokens on every engine: ranks without weights get the same rows, and one process gives the same curve."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.testing import tiny
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

TOKENS = ["<|tool|>", "<|call|>"]
METHODS: dict[str, dict[str, Any]] = {"full": {"name": "full"}, "lora": {"name": "lora", "r": 4}}
ENGINES = [("ddp", 1), ("ddp", 2), ("fsdp", 2), ("zero3", 2)]
CASES = [
    (method, tied, engine, world)
    for method, tied in (("full", True), ("lora", True), ("lora", False))
    for engine, world in ENGINES
]


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Path) -> dict[bool, str]:
    folders = {}
    for tied in (True, False):
        folder = tmp_path_factory.mktemp("tied" if tied else "untied")
        folders[tied] = tiny.save("llama", folder, vocab_size=512, tie_word_embeddings=tied)
        AutoTokenizer.from_pretrained(tiny_tokenizer).save_pretrained(folder)
    return folders


@pytest.fixture(scope="module")
def runs(bases: dict[bool, str], tmp_path_factory: pytest.TempPathFactory) -> dict[tuple, Path]:
    top = tmp_path_factory.mktemp("added")
    data = top / "rows.jsonl"
    texts = [f"<|tool|>order {i} is {'late' * (i % 3)}<|call|> billing" for i in range(24)]
    data.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    folders = {}
    for wanted in (1, 2):
        cases = []
        for case in CASES:
            method, tied, engine, world = case
            if world == wanted:
                folders[case] = top / f"{method}-{tied}-{engine}-{world}"
                config = {
                    "run_name": "r",
                    "output_dir": str(folders[case]),
                    "model": {"dtype": "float32", "name_or_path": bases[tied], "add_tokens": TOKENS},
                    "task": {"name": "causal_lm", "max_length": 64, "packing": False},
                    "data": {"train": str(data), "shuffle": False, "cache_dir": str(top / "cache")},
                    "method": METHODS[method],
                    "engine": {"name": engine},
                    "optim": {"learning_rate": 1e-2, "lr_scheduler_type": "linear"},
                    "train": {"max_steps": 5, "global_batch_size": 8, "per_device_train_batch_size": 4 // world},
                    "track": {"wandb": "off", "report": False},
                    "launch": {"name": "local", "workers_per_node": world},
                }
                cases.append({"config": config, "export": True})
        spawn(wanted, "tests.dist.cases:run_cases", cases, timeout_s=500)
    return folders


def test_one_curve(runs: dict[tuple, Path]) -> None:
    for case, folder in runs.items():
        alone = metrics_of(runs[(*case[:2], "ddp", 1)])
        for name in ("train/loss", "train/grad_norm"):
            wanted = [line[name] for line in alone]
            assert [line[name] for line in metrics_of(folder)] == pytest.approx(wanted, rel=1e-5), (case, name)
        assert alone[-1]["train/loss"] < alone[0]["train/loss"]


def test_only_the_new_rows_and_the_adapter_learn(runs: dict[tuple, Path]) -> None:
    for case, folder in runs.items():
        method, tied, *_ = case
        if method == "lora":
            learned = torch.load(folder / "weights.pt", weights_only=True)
            rows = {name: tensor for name, tensor in learned.items() if "lora_" not in name}
            assert sorted(tensor.shape for tensor in rows.values()) == [(2, 32)] * (1 if tied else 2), case
            stored = load_file(folder / "model" / "adapter_model.safetensors")
            assert len(stored) == len(learned)


def test_exports_load_by_hand_and_old_rows_are_the_base_s(runs: dict[tuple, Path], bases: dict[bool, str]) -> None:
    for case, folder in runs.items():
        method, tied, *_ = case
        model: Any = AutoModelForCausalLM.from_pretrained(bases[tied] if method == "lora" else folder / "model")
        if method == "full":
            assert len(model.get_input_embeddings().weight) == 514
            assert (model.lm_head.weight is model.model.embed_tokens.weight) == tied
            continue
        old = model.get_input_embeddings().weight.detach().clone()
        model.resize_token_embeddings(514, mean_resizing=False)
        merged = peft.PeftModel.from_pretrained(model, folder / "model").merge_and_unload()
        new = merged.get_input_embeddings().weight
        assert torch.equal(new[:512], old), case
        assert not torch.isclose(new[512:], old.mean(dim=0), atol=1e-4).all(dim=1).any(), case
