"""Tiny models of many shapes that read words, and labelled rows for them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers
from tokenizers import models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

WORDS = [f"w{i}" for i in range(90)]
SPECIAL = ["[PAD]", "[CLS]", "[SEP]", "[UNK]", "[MASK]", "<eos>"]
LABELS = ["calm", "glad", "cross"]
SIZE = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
WIDE = {**SIZE, "intermediate_size": 48, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}

SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "bert": ("Bert", {**SIZE, "intermediate_size": 48, "max_position_embeddings": 64}),
    "distilbert": ("DistilBert", {"vocab_size": 96, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4}),
    "roberta": ("Roberta", {**SIZE, "intermediate_size": 48, "max_position_embeddings": 66}),
    "gpt2": ("GPT2", {"vocab_size": 96, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", {**SIZE, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("Bloom", {"vocab_size": 96, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "llama": ("Llama", WIDE),
    "qwen3": ("Qwen3", WIDE),
}
ENCODERS = ("bert", "distilbert", "roberta")
SIDES = {f"{side}_{key}": n for side in ("encoder", "decoder") for key, n in (("layers", 2), ("attention_heads", 4))}
ENDS = {"pad_token_id": 0, "eos_token_id": 2}
ENCODER_DECODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "t5": (
        "T5",
        {"vocab_size": 96, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
        | {**ENDS, "decoder_start_token_id": 0, "tie_word_embeddings": True},
    ),
    "bart": (  # its decoder starts with EOS
        "Bart",
        {"vocab_size": 96, "d_model": 32, "max_position_embeddings": 64, **SIDES, **ENDS, "bos_token_id": 1}
        | {"encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "decoder_start_token_id": 2, "forced_eos_token_id": 2}
        | {"init_std": 0.2},  # else all texts are alike
    ),
}


def make_model(shape: str, folder: Path, auto_class: str = "AutoModel", **changes: Any) -> str:
    """A model without dropout, random weights, and a tokenizer of words; a decoder's has no padding token.

    `auto_class` says with which head, none by default; `changes` are of its configuration.
    """
    kind, settings = {**SHAPES, **ENCODER_DECODERS}[shape]
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**{**settings, **changes})
    for key in vars(config):
        if "drop" in key and isinstance(getattr(config, key), float):
            setattr(config, key, 0.0)
    getattr(transformers, auto_class).from_config(config).save_pretrained(folder)
    words = tokenizers.Tokenizer(models.WordLevel({w: i for i, w in enumerate([*SPECIAL, *WORDS])}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    if shape in ENCODERS or shape in ENCODER_DECODERS:
        words.post_processor = processors.TemplateProcessing(
            single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
        )
        names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "mask_token": "[MASK]"}
        names |= {} if shape in ENCODERS else {"eos_token": "[SEP]"}
    else:
        names = {"eos_token": "<eos>"}
    inputs = ["input_ids", "attention_mask", *(["token_type_ids"] if shape == "bert" else [])]
    PreTrainedTokenizerFast(
        tokenizer_object=words, unk_token="[UNK]", model_input_names=inputs, **names
    ).save_pretrained(folder)
    return str(folder)


def make_rows(path: Path, count: int = 37) -> list[dict[str, Any]]:
    """Texts of 2 to 20 words, the label told by the first; unevenly many of each."""
    dice = random.Random(3)
    rows = []
    for _ in range(count):
        label = dice.choices(range(3), weights=[5, 3, 1])[0]
        text = " ".join([WORDS[label], *dice.choices(WORDS[3:], k=dice.randint(1, 19))])
        rows.append({"text": text, "label": label, "label_text": LABELS[label]})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return rows


def make_questions(path: Path, count: int = 11) -> None:
    """Contexts of one to four pieces; the answer, of one or two words, stands behind the word that is asked for."""
    dice = random.Random(5)
    rows = []
    for _ in range(count):
        words = dice.choices(WORDS[8:], k=dice.randint(4, 40))
        cue, at = dice.choice(WORDS[:8]), dice.randrange(len(words) - 2)
        answer = " ".join(words[at : at + dice.randint(1, 2)])
        start = len(" ".join([*words[:at], cue, ""]))
        context = " ".join([*words[:at], cue, *words[at:]])
        rows.append({"question": cue, "context": context, "answers": {"text": [answer], "answer_start": [start]}})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def config_of(folder: Path, model: str, data: Path, engine: str, world: int, **changes: Any) -> dict[str, Any]:
    """A run over labelled rows; `changes` are whole groups."""
    given: dict[str, Any] = {
        "run_name": folder.name,
        "output_dir": str(folder),
        "model": {"name_or_path": model},
        "task": {"name": "sequence_classification", "max_length": 32, "class_weights": "balanced"},
        "data": {
            "train": str(data),
            "validation": str(data),
            "shuffle": False,
            "cache_dir": str(folder.parent / "cache"),
        },
        "method": {"name": "full"},
        "engine": {"name": engine},
        "optim": {"learning_rate": 3e-3, "weight_decay": 0.1, "lr_scheduler_type": "linear", "max_grad_norm": 1.0},
        "train": {"max_steps": 6, "global_batch_size": 8, "per_device_train_batch_size": 8 // world // 2},
        "track": {"wandb": "off"},
        "launch": {"name": "local", "workers_per_node": world},
    }
    return {**given, **changes}
