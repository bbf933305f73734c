"""A run that goes on with other rows and other base weights ends before it trains, unless its user accepts that."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

pytestmark = [pytest.mark.faults, pytest.mark.slow, pytest.mark.timeout(240)]


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_changed_run_is_refused_in_one_message(
    start: Callable, tmp_path: Path, tiny_llama: Path, method: str
) -> None:
    model, rows = tmp_path / "model", tmp_path / "rows.jsonl"
    model.mkdir()
    for file in tiny_llama.iterdir():
        (model / file.name).write_bytes(file.read_bytes())
    words = [f"method={method}", f"model.name_or_path={model}", "launch.workers_per_node=1"]

    def run(*more: str) -> tuple[int, str]:
        job = start("", "ddp", *words, *more)
        output = job.process.communicate(timeout=120)[0]
        return job.process.returncode, output

    code, output = run("train.max_steps=2")
    assert code == 0, output
    weights = load_file(model / "model.safetensors")
    name = sorted(weights)[0]
    weights[name].flat[0] += 1
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    lines = rows.read_text().splitlines()
    rows.write_text("\n".join(lines[: len(lines) // 2]) + "\n")
    code, output = run("train.max_steps=4")
    assert code == 2 and output.count("dist-ft: invalid request") == 1, output
    assert "data.train: is not what the run was trained with until step 2: data.train: 64 rows, 768 tokens" in output
    assert "→ 32 rows, 384 tokens" in output and "model.name_or_path: is not what" in output, output
    code, output = run("train.max_steps=4", "train.accept_changes=[data,base]")
    assert code == 0 and output.count("(accepted by train.accept_changes)") == 2, output
    card = (tmp_path / "run" / "model" / "README.md").read_text()
    assert "data.train changed after step 2" in card and "model.name_or_path changed after step 2" in card
    steps = [json.loads(line)["step"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert steps == [1, 2, 3, 4], "the refused start trained nothing"
