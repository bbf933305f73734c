"""Tests of the tiny model and tokenizer that other tests use."""

from __future__ import annotations

import os
from pathlib import Path

PROMPT = "<|im_start|>user\nMy bill is wrong<|im_end|>\n<|im_start|>assistant\n"


def test_tiny_llama_loads_with_its_tokenizer(tiny_llama: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, tokenizer = AutoModelForCausalLM.from_pretrained(tiny_llama), AutoTokenizer.from_pretrained(tiny_llama)
    messages = [{"role": "user", "content": "My bill is wrong"}]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == PROMPT
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    assert tokenizer.decode(ids[0]) == PROMPT
    assert model(ids).logits.shape == (1, ids.shape[1], 512)
    assert model.config.eos_token_id == tokenizer.eos_token_id != tokenizer.pad_token_id


def test_nothing_reaches_for_the_network() -> None:
    assert os.environ["HF_HUB_OFFLINE"] == "1"
    assert os.environ["WANDB_MODE"] == "offline"
