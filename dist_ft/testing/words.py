"""Tiny models with a tokenizer whose tokens are whole words: `w0` to `w89`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import tokenizers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from . import tiny

WORDS = [f"w{i}" for i in range(90)]
UNKNOWN = "[UNK]"
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", UNKNOWN, "[MASK]", "<eos>"]
ENCODERS = ("bert", "roberta", "distilbert")
DECODERS = ("llama", "qwen3", "gpt2", "opt", "bloom")
ENCODER_DECODERS = ("t5", "bart")


def save_model(name: str, folder: Path, auto_class: str = "AutoModel", **changes: Any) -> str:
    """Save a tiny model with random weights and its tokenizer into a folder and return its path.

    The tokenizer of an encoder frames texts in [CLS] and [SEP], and that of a decoder has no padding token.

    Args:
        name: An architecture of `dist_ft.testing.tiny`.
        folder: Where to write; created if missing.
        auto_class: Name of the class of transformers that chooses the head; by default the model has none.
        changes: Settings of the configuration.
    """
    path = tiny.save(name, folder, auto_class, **{"vocab_size": len(SPECIAL) + len(WORDS), **changes})
    vocabulary = {word: i for i, word in enumerate([*SPECIAL, *WORDS])}
    words = tokenizers.Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if name in ENCODERS or name in ENCODER_DECODERS:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        tokens = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        tokens |= {} if name in ENCODERS else {"eos_token": "[SEP]"}
    else:
        tokens = {"eos_token": "<eos>"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if name == "bert" else [])]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token=UNKNOWN, model_input_names=inputs, **tokens
    ).save_pretrained(folder)
    return path
