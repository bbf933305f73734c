"""Miniatures of a model: the same class and the same kinds of layers, with small sizes and random weights.

What a class does with its inputs (which tokens a token sees, what padding changes) does not depend on its sizes. A
miniature shows it within a fraction of a second on a CPU, before the weights of the real model are read.
"""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

VOCABULARY = 64
WINDOW = 4  # tokens of every sliding window and attention chunk, and selected by sparse attention
HIDDEN, HEADS, HEAD, HALF_HEAD, INNER, RANK, EXPERTS, STATE = 64, 4, 16, 8, 32, 8, 4, 8


def _window(value: int) -> int:
    return min(value, WINDOW) if value > 0 else value


def _at_most(limit: int) -> Callable[[int], int]:
    return lambda value: min(value, limit)


def _exactly(size: int) -> Callable[[int], int]:
    return lambda value: size if value > 0 else value


NUM_EXPERTS = r"num_experts|n_routed_experts|num_local_experts|moe_num_experts|zero_expert_num"
TOP_K = r"num_experts_per_tok(en)?|moe_top_?k|moe_k|top_k_experts"

# Names of integers in the configurations of transformers, by what they mean; the first pattern that matches counts.
SIZES: list[tuple[str, Callable[[int], int]]] = [
    (r"max_window_layers|.*window_layers|.*_interval|.*_period|.*_offset|.*pattern.*", lambda value: value),
    (r".*vocab.*", _at_most(VOCABULARY)),
    (r".*token_id|.*token_index|.*padding_idx", _at_most(VOCABULARY - 1)),
    # attention
    (r".*window(_size|_len)?|sliding_window_size|attention_chunk_size|index_topk|local_attention", _window),
    (r"floor_scale", _window),  # Llama 4 scales queries by their place in the row, in steps of so many tokens
    (r"index_block_size|index_topk_blocks", _at_most(2)),
    (r"(swa_)?num_key_value_heads|num_kv_heads|num_query_groups", _at_most(HEADS // 2)),
    (
        r"(.*_)?num_attention_heads|(encoder_|decoder_)?attention_heads|n_heads?|index_n_heads|num_heads",
        _exactly(HEADS),
    ),
    (r"qk_rope_head_dim|qk_nope_head_dim|rotary_dim", _exactly(HALF_HEAD)),
    (r"(.*_)?head_dim|kv_channels|d_head|d_kv|dim_head|attention_head_size", _exactly(HEAD)),
    (r".*_rank", _exactly(RANK)),
    # mixtures of experts
    (NUM_EXPERTS, _at_most(EXPERTS)),
    (TOP_K, _at_most(2)),
    (r"n_group|num_expert_group", _at_most(2)),
    (r"topk_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", _at_most(1)),
    # linear attention and state-space models
    (r"linear_num_key_heads|linear_num_heads", _exactly(HEADS // 2)),
    (r"linear_num_value_heads", _exactly(HEADS)),
    (r"(mamba_)?expand", _at_most(1)),
    (r"mamba_(n|num)_heads|n_mamba_heads", _exactly(HEADS)),
    (r"mamba_d_head|mamba_head_?dim", _exactly(HEAD)),
    (r".*state_size|mamba_d_state", _exactly(STATE)),
    (r"mamba_d_ssm", _exactly(HIDDEN)),
    (r"n_groups|mamba_n_?groups", _at_most(1)),
    (r"(mamba_)?chunk_size", _at_most(STATE)),
    # width
    (r".*intermediate_size.*|.*ffn.*|d_ff|dim_ff|dff|d_inner", _exactly(INNER)),
    (
        r"hidden_size|d_model|n_embd|dim|emb_dim|embedding_size|embedding_dim|word_embed_proj_dim|lru_width",
        _exactly(HIDDEN),
    ),
]


def build_miniature(
    model_class: type[PreTrainedModel],
    settings: PreTrainedConfig,
    kernel: str,
    dtype: torch.dtype,
    *,
    keep_top_k: bool = False,
) -> PreTrainedModel:
    """Build a small model of this class on the CPU in evaluation mode; the same weights in every process.

    Args:
        model_class: Class of the real model.
        settings: Configuration of the real model; not changed.
        kernel: Name of the attention implementation in transformers.
        dtype: Of the weights; some classes do not compute in float64.
        keep_top_k: Whether a token has as many experts as in the real model.

    Raises:
        Exception: Whatever the class raises on a configuration that it does not accept.
    """
    takes_text = getattr(model_class, "config_class", None) in type(settings).sub_configs.values()
    small = copy.deepcopy(settings.get_text_config() if takes_text else settings)
    given = copy.deepcopy(small)
    shrink(small)
    if keep_top_k:
        _restore_top_k(small, given)
    small._attn_implementation = kernel
    small._experts_implementation = "eager"  # grouped matrix products do not know float64
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.manual_seed(0)
        model = model_class(small).to(dtype).eval()
    draw_weights(model, seed=0)
    return model


def draw_weights(model: PreTrainedModel, seed: int) -> None:
    """Draw the matrices of a miniature at a scale at which no sublayer vanishes beside the residual stream."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        if parameter.dim() >= 2:
            std = 1 / math.sqrt(parameter.shape[-1])
            parameter.data = torch.randn(parameter.shape, generator=generator, dtype=parameter.dtype) * std


def shrink(settings: PreTrainedConfig) -> None:
    """Set the sizes of a configuration, and of those that it consists of, to small ones that fit each other."""
    given = dict(vars(settings))
    for name, value in given.items():
        if isinstance(value, PreTrainedConfig):
            shrink(value)
        else:
            setattr(settings, name, _fit(name, value, given))
    if of_layers := settings.to_dict().get("per_layer_config"):  # values that differ from layer to layer
        settings.per_layer_config = {
            layer: {name: _fit(name, value, given | values) for name, value in values.items()}
            for layer, values in of_layers.items()
        }


def _restore_top_k(settings: PreTrainedConfig, given: PreTrainedConfig) -> None:
    """Give a small configuration its number of experts per token back, and at least twice as many experts."""
    values = vars(given)
    counts = [n for key, value in values.items() if re.fullmatch(TOP_K, key) for n in _integers(value)]
    for key, value in values.items():
        if isinstance(value, PreTrainedConfig):
            _restore_top_k(getattr(settings, key), value)
        elif re.fullmatch(TOP_K, key):
            setattr(settings, key, value)
        elif counts and re.fullmatch(NUM_EXPERTS, key) and isinstance(value, int):
            setattr(settings, key, min(value, max(EXPERTS, 2 * max(counts))))


def _integers(value: Any) -> list[int]:
    return [n for n in (value if isinstance(value, list) else [value]) if isinstance(n, int)]


def _fit(name: str, value: Any, given: Mapping[str, Any]) -> Any:
    """Return the small value of a key; `given` are the values of all keys."""
    latent = "qk_rope_head_dim" in given  # multi-head latent attention
    if name == "num_key_value_heads" and value and (latent or value == given.get("num_attention_heads")):
        return HEADS
    if name == "head_dim" and value and latent:
        return HALF_HEAD
    if name == "attention_hidden_size" and "hidden_size" in given:  # twice the hidden size in Zamba
        return value // given["hidden_size"] * HIDDEN
    if name in ("rope_parameters", "rope_scaling") and value:
        return _small_rope(value)
    return _small(name, value)


def _small(name: str, value: Any) -> Any:
    if isinstance(value, list):  # one for each layer
        return [_small(name, entry) for entry in value]
    if isinstance(value, dict):
        return {key: _small(str(key), entry) for key, entry in value.items()}
    for pattern, size in SIZES if isinstance(value, int) and not isinstance(value, bool) else ():
        if re.fullmatch(pattern, name):
            return size(value)
    return value


def _small_rope(rope: dict[str, Any]) -> dict[str, Any]:
    """Return rotary embeddings without extension, whose factors are lists of the length of a head."""
    if any(isinstance(value, dict) for value in rope.values()):  # one for each kind of layer
        return {kind: _small_rope(value) if isinstance(value, dict) else value for kind, value in rope.items()}
    kept = {name: value for name, value in rope.items() if not isinstance(value, list)}
    kind = rope.get("rope_type", "default")  # axial, in vision towers, is no extension
    return (
        kept
        | {"rope_type": "default" if kind in ROPE_INIT_FUNCTIONS else kind}
        | ({"mrope_section": [2, 3, 3]} if "mrope_section" in rope else {})
    )
