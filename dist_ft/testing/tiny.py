"""Tiny models of many architectures, built by name with deterministic weights.

Building reads no file and opens no connection. The models have no dropout, so that losses and gradients can be
compared; a test that needs dropout, other sizes or another head passes them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import transformers

VOCABULARY = 97  # a prime number: no world size divides it
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
}
DECODER = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 2, "max_position_embeddings": 64}
ENCODER = {**SIZES, "intermediate_size": 48, "max_position_embeddings": 64}
# sizes of the mixtures of experts; also for a dense model that is compared with one
NARROW: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 4,
    "pad_token_id": 0,
}
EXPERTS = {**NARROW, "num_experts_per_tok": 2, "attn_implementation": "eager"}  # GPT-OSS has no sdpa
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
BART = {f"{side}_layers": 2 for side in ("encoder", "decoder")}
BART |= {f"{side}_attention_heads": 4 for side in ("encoder", "decoder")}
BART |= {f"{side}_ffn_dim": 48 for side in ("encoder", "decoder")}

CAUSAL, MASKED, SEQ2SEQ = (f"AutoModelFor{kind}LM" for kind in ("Causal", "Masked", "Seq2Seq"))

# name: (prefix of the classes in transformers, auto class, settings of the configuration)
ARCHITECTURES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", CAUSAL, DECODER),
    "qwen2": ("Qwen2", CAUSAL, DECODER),
    "qwen3": ("Qwen3", CAUSAL, {**DECODER, "head_dim": 8}),
    "mistral": ("Mistral", CAUSAL, {**DECODER, "head_dim": 8}),
    "gemma2": ("Gemma2", CAUSAL, {**DECODER, "head_dim": 8, "query_pre_attn_scalar": 8}),
    "gpt2": ("GPT2", CAUSAL, {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "opt": ("OPT", CAUSAL, {**SIZES, "ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64}),
    "bloom": ("Bloom", CAUSAL, {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "bert": ("Bert", MASKED, ENCODER),
    "roberta": ("Roberta", MASKED, {**ENCODER, "max_position_embeddings": 66}),  # positions start behind padding's
    "modernbert": ("ModernBert", MASKED, {**ENCODER, "pad_token_id": 0}),
    "distilbert": (
        "DistilBert",
        MASKED,
        {"vocab_size": VOCABULARY, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
    ),
    "t5": (
        "T5",
        SEQ2SEQ,
        {**T5, "pad_token_id": 0, "eos_token_id": 2, "decoder_start_token_id": 0, "tie_word_embeddings": True},
    ),
    "bart": (  # the decoder starts with EOS; with the default init_std, the outputs of all texts are nearly equal
        "Bart",
        SEQ2SEQ,
        {"vocab_size": VOCABULARY, "d_model": 32, "max_position_embeddings": 64, "init_std": 0.2, **BART}
        | {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "forced_eos_token_id": 2}
        | {"decoder_start_token_id": 2},
    ),
    "mixtral": ("Mixtral", CAUSAL, {**EXPERTS, "num_local_experts": 4}),
    "qwen3_moe": ("Qwen3Moe", CAUSAL, {**EXPERTS, "num_experts": 4, "moe_intermediate_size": 8}),
    "olmoe": ("Olmoe", CAUSAL, {**EXPERTS, "num_experts": 4}),
    "gpt_oss": ("GptOss", CAUSAL, {**EXPERTS, "num_local_experts": 4}),
    "deepseek_v3": (
        "DeepseekV3",
        CAUSAL,
        {**EXPERTS, "num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
        | {"moe_intermediate_size": 8, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8}
        | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 4, "v_head_dim": 8},
    ),
}
MIXTURES = ("mixtral", "qwen3_moe", "olmoe", "gpt_oss", "deepseek_v3")  # two of four experts per token


def make_config(name: str, **changes: Any) -> Any:
    """Return the configuration of an architecture, without dropout.

    Args:
        name: A key of `ARCHITECTURES`.
        changes: Settings that replace or extend those of the table.
    """
    prefix, _, settings = ARCHITECTURES[name]
    config = getattr(transformers, f"{prefix}Config")(**{**settings, **changes})
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float) and key not in changes:
            setattr(config, key, 0.0)
    return config


def build(name: str, auto_class: str | None = None, **changes: Any) -> Any:
    """Build a model with the random weights of seed 0.

    The seed of torch is set and not restored, so that what a test draws afterwards is deterministic, too.

    Args:
        name: A key of `ARCHITECTURES`.
        auto_class: Name of the class of transformers that chooses the head; by default a language model.
        changes: Settings that replace or extend those of the table.
    """
    torch.manual_seed(0)
    auto = getattr(transformers, auto_class or ARCHITECTURES[name][1])
    return auto.from_config(make_config(name, **changes))


def save(name: str, folder: Path, auto_class: str | None = None, **changes: Any) -> str:
    """Save a model of `build` and return the path of its folder.

    Args:
        name: A key of `ARCHITECTURES`.
        folder: Where to write; created if missing.
        auto_class: As for `build`.
        changes: As for `build`.
    """
    build(name, auto_class, **changes).save_pretrained(folder)
    return str(folder)
