"""What was forgotten is the loss on general text before and after, against a plain loop."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess import evaluate
from tests.runs import finish_run
from tests.samples import load_adapted


def test_what_was_forgotten_is_that_of_a_loop_by_hand(
    lora_run: Path, tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = "The screen is black and the invoice is wrong. " * 40
    (tmp_path / "general.txt").write_text(text)
    evaluate.main([str(lora_run / "run.yaml"), f"general={tmp_path / 'general.txt'}"])
    written = json.loads((lora_run / "eval-validation.json").read_text())["general"]
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama)
    ids = torch.tensor(tokenizer(text.strip())["input_ids"] + [tokenizer.eos_token_id])
    models = {"base": AutoModelForCausalLM.from_pretrained(tiny_llama), "export": load_adapted(lora_run, tiny_llama)}
    for which, model in models.items():
        sums = [(float(model(b[None], labels=b[None]).loss) * (len(b) - 1), len(b) - 1) for b in ids.split(128)]
        loss = sum(loss for loss, _ in sums) / sum(count for _, count in sums)
        assert written[which]["loss"] == pytest.approx(loss, rel=1e-4)
    assert "nats per token" in capsys.readouterr().out


def test_forgetting_behind_virtual_tokens_is_measured_over_padded_rows(
    tiny_llama: Path, run_cache: Path, tmp_path: Path
) -> None:
    run = finish_run(tmp_path / "run", tiny_llama, {"name": "prompt", "num_virtual_tokens": 2}, run_cache)
    (tmp_path / "general.txt").write_text("The screen is black.\n")
    evaluate.main([str(run / "run.yaml"), f"general={tmp_path / 'general.txt'}"])
    written = json.loads((run / "eval-validation.json").read_text())["general"]
    assert written["base"]["loss"] != written["export"]["loss"]
