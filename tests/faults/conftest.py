"""Fixture that starts training runs whose processes are gone after the test."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from dist_ft.launch.composition.compose import list_groups
from dist_ft.launch.composition.words import override_words
from tests.faults.jobs import Job


@pytest.fixture
def start(tmp_path: Path, tiny_llama: Path) -> Iterator:
    rows = tmp_path / "rows.jsonl"
    texts = [list(range(1 + i, 13 + i)) for i in range(64)]
    rows.write_text("".join(json.dumps({"input_ids": t, "labels": [-100] * 6 + t[6:]}) + "\n" for t in texts))
    jobs: list[Job] = []

    def begin(fault: str, engine: str = "ddp", *words: str, slow: str = "") -> Job:
        common = [
            f"output_dir={tmp_path / 'run'}", f"model.name_or_path={tiny_llama}",
            f"data.train={rows}", "data.validation=null", "data.test=null",
            "data.format=tokens", f"data.cache_dir={tmp_path / 'cache'}", f"engine={engine}", "method=full",
            "track.wandb=off", "track.report=false", "train.num_train_epochs=null", "train.max_steps=500",
            "train.global_batch_size=4", "train.per_device_train_batch_size=2", "launch.workers_per_node=2",
        ]  # fmt: skip
        jobs.append(Job(tmp_path, fault, override_words(common, words, list_groups()), slow))
        return jobs[-1]

    yield begin
    for job in jobs:
        for process in job.members():
            process.kill()
