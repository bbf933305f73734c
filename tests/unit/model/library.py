"""Configurations of every causal language model of transformers, as published models have them.

The defaults of some classes leave out what their published models have (windows, layers of another kind, numbers of
heads): such values are given here. Sizes do not matter, because the product builds miniatures.
"""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

import transformers
from transformers import CONFIG_MAPPING, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

# the default configuration fails its own validation; every attention mask gives NaN
INVALID = {"gemma4_assistant", "prophetnet"}
DOCUMENT = Path(__file__).resolve().parents[3] / "docs" / "models.md"  # has the tables that tests compute
CAUSAL: tuple[str, ...] = tuple(name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in INVALID)
# for every configuration that has such a key without a value
USUAL: dict[str, Any] = {
    "sliding_window": 1024,
    "use_sliding_window": True,
    "num_experts_per_tok": 2,
    "n_routed_experts": 8,
    "n_shared_experts": 1,
    "n_group": 1,
    "topk_group": 1,
    "is_decoder": True,
}
CONVOLUTIONS = ["conv", "conv", "full_attention"]
GEMMA_MIXTURE = {"enable_moe_block": True, "num_experts": 8, "top_k_experts": 2, "moe_intermediate_size": 32}
SPECIAL: dict[str, dict[str, Any]] = {
    "lfm2": {"num_hidden_layers": 6, "layer_types": CONVOLUTIONS * 2},
    "lfm2_moe": {"num_hidden_layers": 6, "layer_types": CONVOLUTIONS * 2},
    "nemotron_h": {"layer_types": ["linear_attention", "moe", "full_attention", "linear_attention"]},
    "cohere_compass_text": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "qwen2": {"max_window_layers": 16},
    "qwen2_moe": {"use_sliding_window": False},
    "doge": {"sliding_window": None, "is_moe": True},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8, "rope_theta": 5e5},
        "ffn_config": {"moe_num_experts": 16, "moe_top_k": 4, "ffn_hidden_size": 64},
    },
    "hunyuan_v1_moe": {"num_experts": 8, "moe_topk": 2},
    "gemma4": GEMMA_MIXTURE,
    "gemma4_text": GEMMA_MIXTURE,
}


def class_of(model_type: str) -> type[PreTrainedModel]:
    """Return the class of the model type's causal language model."""
    found: type[PreTrainedModel] = getattr(transformers, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES[model_type])
    return found


def published(model_type: str, layers: int | None = None) -> PreTrainedConfig:
    """Return a configuration with the kinds of layers that published models of this type have.

    Args:
        model_type: Model type.
        layers: Number of layers, for classes that accept another number than that of published models.
    """
    kind = CONFIG_MAPPING[model_type]
    special = SPECIAL.get(model_type, {})
    parts = {key: value for key, value in special.items() if key.endswith("_config")}
    default = kind(**parts)
    text = default.get_text_config(decoder=True)
    held = vars(text)  # not by getattr, which raises where layers have values of their own
    given = {key: value for key, value in USUAL.items() if held.get(key, "") in (None, False)}
    heads = held.get("num_attention_heads")
    given |= {"num_key_value_heads": heads} if held.get("num_key_value_heads", "") is None else {}
    given |= {"head_dim": text.hidden_size // heads} if held.get("head_dim", "") is None else {}
    if layers is not None and "layer_types" not in special and text is default:
        with contextlib.suppress(Exception):
            default = text = kind(**parts, num_hidden_layers=layers)
            given["num_hidden_layers"] = layers
    given |= {key: value for key, value in special.items() if key not in parts}
    if text is default:
        with contextlib.suppress(TypeError, ValueError):
            text = default = kind(**parts, **given)
    for key, value in given.items():
        setattr(text, key, value)
    return default
