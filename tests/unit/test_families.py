"""What a configuration makes of a model before an engine takes it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_ft.config.run import RunConfig
from dist_ft.families import ModelRecipe, build_method, choose_attention
from dist_ft.state import CAUSAL_LM
from dist_ft.task.batches.tokens import collate_documents, collate_padded, sum_losses
from tests.samples import samples_of

CPU = torch.device("cpu")


def make_config(folder: Path, method: dict[str, Any], **changes: dict[str, Any]) -> RunConfig:
    content: dict[str, Any] = {
        "run_name": "r",
        "output_dir": "runs/r",
        "model": {"dtype": "float32", "name_or_path": str(folder), **changes.get("model", {})},
        "task": {"name": "causal_lm", "packing": False},
        "data": {"train": "rows.jsonl"},
        "method": method,
        "engine": {"name": "ddp"},
        "optim": {},
        "train": changes.get("train", {}),
        "track": {},
        "launch": {"name": "local"},
    }
    return RunConfig.model_validate(content)


@pytest.mark.parametrize(
    "method",
    [{"name": "full"}, {"name": "lora", "r": 2}, {"name": "adapter"}, {"name": "prompt", "num_virtual_tokens": 3}],
    ids=lambda method: method["name"],
)
def test_noise_on_embeddings_reaches_the_model_under_every_wrapper(method: dict[str, Any], tiny_llama: Path) -> None:
    def losses(**train: float) -> list[float]:
        config = make_config(tiny_llama, method, train=train)
        attention = choose_attention(config, str(tiny_llama), CPU, CAUSAL_LM)
        collate = collate_documents if attention.padding_free else collate_padded
        rows = [np.array(row) for row in ([3, 4, 5, 6, 7], [9, 8, 7])]
        batch = collate(samples_of([[{"input_ids": row, "labels": row}] for row in rows]))
        model = (
            ModelRecipe(config, str(tiny_llama), attention, CAUSAL_LM, build_method(config)).build(weights=True).model
        )
        found = []
        for training in (True, False):
            torch.manual_seed(0)
            found.append(float(sum_losses(model.train(training), batch).loss))
        return found

    plain, noisy = losses(), losses(neftune_noise_alpha=15.0)
    assert plain[0] == plain[1] == noisy[1]
    assert noisy[0] != plain[0]


def test_dropout_of_the_model_is_set(tiny_llama: Path) -> None:
    config = make_config(tiny_llama, {"name": "full"}, model={"dropout": 0.25})
    attention = choose_attention(config, str(tiny_llama), CPU, CAUSAL_LM)
    model: Any = (
        ModelRecipe(config, str(tiny_llama), attention, CAUSAL_LM, build_method(config)).build(weights=True).model
    )
    assert model.model.layers[0].self_attn.attention_dropout == 0.25


def test_a_model_without_weights_generates_as_its_folder_says(tiny_llama: Path, tmp_path: Path) -> None:
    """Ranks that are sent their weights build it so; what they generate enters the scores."""
    folder = tmp_path / "model"
    shutil.copytree(tiny_llama, folder)
    path = folder / "generation_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "no_repeat_ngram_size": 3, "eos_token_id": [2, 7]}))
    for model in ({}, {"from_scratch": True}):
        config = make_config(folder, {"name": "full"}, model=model)
        attention = choose_attention(config, str(folder), CPU, CAUSAL_LM)
        recipe = ModelRecipe(config, str(folder), attention, CAUSAL_LM, build_method(config))
        read, bare = (recipe.build(weights=weights).model.generation_config for weights in (True, False))
        assert read.no_repeat_ngram_size == 3 and read.eos_token_id == [2, 7]
        assert bare.to_dict() == read.to_dict()
