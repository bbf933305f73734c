"""`dist-ft generate` on the folder of a run answers as transformers does."""

from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from dist_ft.assess import generate
from dist_ft.assess.speaker import Speaker
from dist_ft.assess.turns import Question
from dist_ft.errors import RequestError
from dist_ft.process.options import GenerateOptions
from tests.runs import move_plan
from tests.samples import load_adapted

CHAT = [{"role": "user", "content": "Refund my order"}]


def test_one_prompt_is_answered_as_transformers_does(
    lora_run: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    generate.main([str(lora_run / "run.yaml"), "prompt=Refund my order", "max_new_tokens=12"])
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    ids = tokenizer.apply_chat_template(CHAT, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = load_adapted(lora_run, tiny_llama)
    output = model.generate(**ids, max_new_tokens=12, do_sample=False, eos_token_id=2, pad_token_id=0)
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text and capsys.readouterr().out == text + "\n"


def test_rows_side_by_side(lora_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    generate.main([str(lora_run / "run.yaml"), "prompts=validation:2", "model=both", "max_new_tokens=4"])
    shown = capsys.readouterr().out
    assert shown.count("\nbase ") == shown.count("\ntuned ") == 2
    assert "Refund my order" in shown and "team: technical" in shown and "Hello there" not in shown


def test_a_chat_remembers(lora_run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    asked: list[list[str]] = []

    def answer(self: object, question: Question, show: Callable[[str], object]) -> str:
        show(f"answer {len(asked) + 1}")
        asked.append([str(message["content"]) for message in question.messages or []])
        return f"answer {len(asked)}"

    monkeypatch.setattr(Speaker, "answer", answer)
    monkeypatch.setattr("sys.stdin", io.StringIO("one\n\ntwo\nclear\nthree\nexit\nfour\n"))
    generate.main([str(lora_run / "run.yaml")])
    assert asked == [["one"], ["one", "answer 1", "two"], ["three"]]
    assert "tuned: answer 3" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["prompt=a", "prompts=b"], "cannot be combined with prompt"),
        (["prompts=nowhere.txt"], "cannot be read"),
        (["prompts=test:3"], "data.test"),
        (["prompt=a", "max_new_tokens=0"], "max_new_tokens"),
        (["prompt=a", f"seed={2**64}"], "seed"),
        (["prompt=a", "top_p=0.9"], "top_p: has no effect with temperature=0"),
        (["prompt=a", "top_p=1.5"], "top_p"),
        (["prompt=a", "chat=false", "system=b"], "system: needs the chat template"),
        (["prompts=validation:1", "system=b"], "rows of the data have their own"),
        (["prompt=a", "max_new_tokens=600"], "exceed the model's limit of 512"),
    ],
)
def test_wrong_words_are_named(full_run: Path, words: list[str], said: str) -> None:
    with pytest.raises(RequestError) as caught:
        generate.main([str(full_run / "run.yaml"), *words])
    assert said in str(caught.value)


def test_a_tokenizer_without_end_and_padding_answers_too(tiny_llama: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_llama, pad_token=None, eos_token=None)
    assert tokenizer.pad_token_id is None and tokenizer.eos_token_id is None
    model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    model.generation_config.update(eos_token_id=None, pad_token_id=None)
    options = GenerateOptions(max_new_tokens=4)
    answer = Speaker("tuned", model, tokenizer, None, options).answer(Question(None, "Refund my order"))
    ids = tokenizer("Refund my order", return_tensors="pt")["input_ids"]
    for _ in range(4):
        ids = torch.cat([ids, model(input_ids=ids).logits[:, -1:].argmax(-1)], dim=1)
    assert answer == tokenizer.decode(ids[0, -4:], skip_special_tokens=True).strip()


def test_a_run_without_an_export_says_so(full_run: Path, tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="no exported model yet"):
        generate.main([str(move_plan(full_run, tmp_path)), "prompt=a"])


def test_a_system_message_and_a_nucleus_reach_the_model(
    lora_run: Path, tiny_llama: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = ["temperature=5", "top_p=0.3", "seed=3", "system=You sell shoes"]
    generate.main([str(lora_run / "run.yaml"), "prompt=Refund my order", "max_new_tokens=12", *own])
    tokenizer = AutoTokenizer.from_pretrained(lora_run / "model")
    messages = [{"role": "system", "content": "You sell shoes"}, *CHAT]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model = load_adapted(lora_run, tiny_llama)
    torch.manual_seed(3)
    output = model.generate(
        **ids, max_new_tokens=12, do_sample=True, temperature=5.0, top_p=0.3, eos_token_id=2, pad_token_id=0
    )
    text = tokenizer.decode(output[0, ids["input_ids"].shape[1] :], skip_special_tokens=True).strip()
    assert text and capsys.readouterr().out == text + "\n"
