"""The tiny model, the uneven rows and the configuration that the distributed tests share."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

pytest.register_assert_rewrite("tests.dist.outcomes")  # so that its assertions say what differs

STEPS, BATCH, MAX_LENGTH, VOCAB = 20, 8, 48, 211  # a vocabulary that no world size divides
LEARNING_RATE, WEIGHT_DECAY, MAX_NORM = 3e-3, 0.1, 1.0


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=80,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCAB,
        max_position_embeddings=64,
        tie_word_embeddings=True,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, list[dict]]:
    """Rows of very uneven lengths and supervised shares: in some only the last token is supervised."""
    dice = random.Random(7)
    rows = []
    for i in range(37):
        length = dice.randint(3, 40)
        ids = [dice.randrange(VOCAB) for _ in range(length)]
        prompt = length - 1 if i % 5 == 0 else dice.randint(0, length - 1)
        rows.append({"input_ids": ids, "labels": [-100] * prompt + ids[prompt:]})
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path), rows


def config_of(
    folder: Path,
    model: str,
    data: str,
    engine: str,
    world: int,
    accumulation: int,
    packing: bool,
    method: dict[str, Any],
) -> dict[str, Any]:
    return {
        "run_name": folder.name,
        "output_dir": str(folder),
        "model": {"name_or_path": model},
        "task": {"name": "instruction", "max_length": MAX_LENGTH, "packing": packing},
        "data": {"train": data, "format": "tokens", "shuffle": False, "cache_dir": str(folder.parent / "cache")},
        "method": method,
        "engine": {"name": engine},
        "optim": {
            "learning_rate": LEARNING_RATE,
            "weight_decay": WEIGHT_DECAY,
            "lr_scheduler_type": "linear",
            "max_grad_norm": MAX_NORM,
        },
        "train": {
            "max_steps": STEPS,
            "global_batch_size": BATCH,
            "per_device_train_batch_size": BATCH // world // accumulation,
        },
        "track": {"wandb": "off"},
        "launch": {"name": "local", "workers_per_node": world},
    }
