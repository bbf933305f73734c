"""Every experiment runs as it stands, with a tiny model and a few rows in the columns of its public data set."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from dist_ft.checks.precision import settle_dtype
from dist_ft.checks.request import check
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.testing.spawn import spawn
from dist_ft.testing.words import save_model
from tests.dist.cases import metrics_of

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ROWS = 40
LONG = {"max_position_embeddings": 600}  # some experiments read texts of 512 tokens
MODELS: dict[str, tuple[str, dict[str, int]]] = {  # name → auto class, settings
    "bert": ("AutoModel", LONG),
    "distilbert": ("AutoModel", LONG),
    "roberta": ("AutoModelForMaskedLM", LONG),
    "gpt2": ("AutoModel", {"n_positions": 600}),
    "opt": ("AutoModelForCausalLM", LONG),
    "t5": ("AutoModelForSeq2SeqLM", {}),
}
TEXTS = [f"w{i} w{i + 1} w{2 * i} w{i % 7}" for i in range(ROWS)]
LABELLED = [{"text": text, "label": ("neg", "pos")[i % 2]} for i, text in enumerate(TEXTS)]
CHAT = [{"messages": [{"role": role, "content": text * 8} for role in ("user", "assistant") * 2]} for text in TEXTS]
PAIRS = [
    {"chosen": row["messages"], "rejected": [*row["messages"][:3], {"role": "assistant", "content": "No."}]}
    for row in CHAT
]
ASKED = [
    {"context": " ".join([text] * 100), "question": "w1", "answers": {"text": [text[:5]], "answer_start": [0]}}
    for text in TEXTS
]
CASES: dict[str, tuple[str, list[dict[str, Any]]]] = {  # experiment → model, rows
    "sentiment_distilbert": ("distilbert", LABELLED),
    "sentiment_bert": ("bert", [{"sentence": row["text"], "label": row["label"]} for row in LABELLED]),
    "sentiment_gpt2": ("gpt2", LABELLED),
    "topics_bert_lora": ("bert", LABELLED),
    "ner_bert": ("bert", [{"tokens": text.split(), "ner_tags": ["O", "B-PER", "I-PER", "O"]} for text in TEXTS]),
    "qa_distilbert": ("distilbert", ASKED),
    "wikitext_mlm": ("roberta", [{"text": text * 40} for text in TEXTS]),
    "wikitext_cpt": ("llama", [{"text": "Words about support. " * 400} for _ in TEXTS]),
    "summarize_t5": ("t5", [{"article": text, "highlights": text[:5]} for text in TEXTS]),
    "concepts_t5": ("t5", [{"concepts": text.split(), "target": text} for text in TEXTS]),
    "quotes_opt_int8": ("opt", [{"quote": text, "author": "w1", "tags": []} for text in TEXTS]),
    "dolly_lora": ("llama", [{"instruction": text, "context": "", "response": text} for text in TEXTS]),
    "multitask_instructions": (
        "llama",
        [{"instruction": t, "context": "", "response": t, "question": t, "answer": t} for t in TEXTS],
    ),
    "chat_lora": ("llama", CHAT),
    "quickstart": ("llama", CHAT),
    "dpo_lora": ("llama", PAIRS),
    "reward_modeling": ("llama", PAIRS),
    "zero3_full": ("llama", CHAT),
}
MIXTURES = {"multitask_instructions": ("dolly", "gsm8k")}  # the names of their sets


def test_every_experiment_has_a_case() -> None:
    assert set(CASES) == set(list_groups()["experiment"])


def build_models(folder: Path, llama: Path) -> dict[str, str]:
    made = {name: save_model(name, folder / name, auto, **changes) for name, (auto, changes) in MODELS.items()}
    return {"llama": str(llama), **made}


def words_of(experiment: str, folder: Path, models: dict[str, str]) -> list[str]:
    """What a user would type to run it on a machine without the hub."""
    model, rows = CASES[experiment]
    data = folder / f"{experiment}.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    sources = [f"data.train={data}", f"data.validation={data}", "data.test=null"]
    if experiment in MIXTURES:
        keys = [f"{name}.{split}" for name in MIXTURES[experiment] for split in ("train", "validation")]
        sources = [f"data.mixture.{key}={data}" for key in keys]
    words = [
        f"experiment={experiment}",
        f"model.name_or_path={models[model]}",
        *sources,
        f"data.cache_dir={folder}/cache",
        f"output_dir={folder}/{experiment}",
        "track=off",
        "launch=local",
        "launch.workers_per_node=1",
        "train.max_steps=2",
        "train.global_batch_size=4",
        "train.per_device_train_batch_size=2",
        "train.eval_steps=1",
    ]
    composed = compose(words)
    if composed.config.train.save_steps:
        words.append("train.save_steps=1")
    return words


def test_every_experiment_trains_and_exports(tmp_path: Path, tiny_llama: Path) -> None:
    models = build_models(tmp_path, tiny_llama)
    cases = []
    for experiment in CASES:
        composed = compose(words_of(experiment, tmp_path, models))
        assert not check(composed.config, composed.origins), experiment
        config, _ = settle_dtype(composed.config, composed.origins, bfloat16=False)
        cases.append({"config": config.model_dump(mode="json"), "export": True})
    spawn(1, "tests.dist.cases:run_cases", cases, timeout_s=500)
    for experiment in CASES:
        lines = metrics_of(tmp_path / experiment)
        losses = [line["train/loss"] for line in lines if "train/loss" in line]
        assert len(losses) == 2 and all(map(math.isfinite, losses)), experiment
        assert all("eval/loss" in line for line in lines), experiment
        assert list((tmp_path / experiment / "model").glob("*.safetensors")), experiment
