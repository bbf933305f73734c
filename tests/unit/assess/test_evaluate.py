"""`dist-ft eval` on the folder of a run, against a plain loop over transformers' models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess import evaluate
from dist_ft.errors import RequestError, TrainingError
from tests.runs import CHATS, move_plan
from tests.samples import load_adapted


@torch.no_grad()
def loss_by_hand(model: torch.nn.Module, tokenizer: Any) -> float:
    """Compute the mean loss over all assistant tokens row by row, with the labels derived from the text."""
    total, count = 0.0, 0
    for row in CHATS:
        prompt = tokenizer.apply_chat_template(row["messages"][:1], tokenize=False, add_generation_prompt=True)
        before = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        answer = tokenizer(row["messages"][1]["content"] + "<|im_end|>", add_special_tokens=False)["input_ids"]
        logits = model(input_ids=torch.tensor([before + answer])).logits[0, len(before) - 1 : -1]
        total += float(functional.cross_entropy(logits, torch.tensor(answer), reduction="sum"))
        count += len(answer)
    return total / count


def test_evaluation_of_base_and_tuned_is_that_of_a_loop_by_hand(
    lora_run: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate.main([str(lora_run / "run.yaml"), "baseline=true"])
    written = json.loads((lora_run / "eval-validation.json").read_text())["metrics"]
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    assert written["export"]["loss"] == pytest.approx(
        loss_by_hand(load_adapted(lora_run, tiny_llama), tokenizer), rel=1e-5
    )
    base = AutoModelForCausalLM.from_pretrained(tiny_llama)
    assert written["base"]["loss"] == pytest.approx(loss_by_hand(base, tokenizer), rel=1e-5)
    shown = capsys.readouterr().out
    assert f"{written['export']['loss']:.4f}" in shown and f"{written['base']['loss']:.4f}" in shown


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["split=test"], "the run has no data.test"),
        (["split=trian"], "split"),
    ],
)
def test_wrong_words_are_named(full_run: Path, words: list[str], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        evaluate.main([str(full_run / "run.yaml"), *words])
    assert said in str(caught.value)


def test_a_run_without_an_export_says_so(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no exported model yet"):
        evaluate.main([str(move_plan(full_run, tmp_path))])


def test_an_export_that_lost_a_tensor_is_not_evaluated(full_run: Path) -> None:
    from safetensors.torch import load_file, save_file

    file = full_run / "model" / "model.safetensors"
    whole = file.read_bytes()
    state = load_file(file)
    del state["model.norm.weight"]
    save_file(state, file, metadata={"format": "pt"})
    try:
        with pytest.raises(TrainingError, match=r"missing keys on loading: model\.norm\.weight"):
            evaluate.main([str(full_run / "run.yaml")])
    finally:
        file.write_bytes(whole)
