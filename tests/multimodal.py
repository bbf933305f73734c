"""Tiny multimodal models, built by name with the random weights of seed 0."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCABULARY = 97
TEXT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_VISION = {
    "depth": 2,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_heads": 2,
    "out_hidden_size": 32,
    "patch_size": 4,
    "num_position_embeddings": 16,
    "deepstack_visual_indexes": [0],
}
MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
IMAGE_TOKENS = {"image_token_id": 90, "video_token_id": 91, "vision_start_token_id": 92, "vision_end_token_id": 93}
CLIP = {**VISION, "model_type": "clip_vision_model", "projection_dim": 16}

# name: (prefix of the classes in transformers, configuration)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gemma3": ("Gemma3", {"text_config": {**TEXT, "sliding_window": 8}, "vision_config": VISION}),
    "llava": (
        "Llava",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP, "image_token_index": 90},
    ),
    "llava_next": (
        "LlavaNext",
        {"text_config": {**TEXT, "model_type": "llama"}, "vision_config": CLIP, "image_token_index": 90},
    ),
    "qwen2_vl": (
        "Qwen2VL",
        {
            "text_config": {**TEXT, "rope_parameters": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 16, "hidden_size": 32, "num_heads": 2, "patch_size": 4},
            **IMAGE_TOKENS,
        },
    ),
    "qwen3_vl": (
        "Qwen3VL",
        {"text_config": {**TEXT, "rope_parameters": MROPE}, "vision_config": QWEN_VISION, **IMAGE_TOKENS},
    ),
    "qwen3_vl_moe": (
        "Qwen3VLMoe",
        {"text_config": {**TEXT, **EXPERTS, "rope_parameters": MROPE}, "vision_config": QWEN_VISION, **IMAGE_TOKENS},
    ),
    "mllama": (
        "Mllama",
        {
            "text_config": {**TEXT, "cross_attention_layers": [1], "pad_token_id": 0},
            "vision_config": {
                **{k: v for k, v in VISION.items() if k != "num_attention_heads"},
                "attention_heads": 2,
                "num_global_layers": 1,
                "intermediate_layers_indices": [0],
                "vision_output_dim": 32,
            },
            "image_token_index": 96,
        },
    ),
}
# What a text does not reach, by reading the models' code.
IDLE = {
    "gemma3": ("model.vision_tower", "model.multi_modal_projector"),
    "llava": ("model.vision_tower", "model.multi_modal_projector"),
    "llava_next": ("model.image_newline", "model.vision_tower", "model.multi_modal_projector"),
    "qwen2_vl": ("model.visual",),
    "qwen3_vl": ("model.visual",),
    "qwen3_vl_moe": ("model.visual",),
    "mllama": ("model.vision_model", "model.language_model.layers.1", "model.multi_modal_projector"),
}


def build(name: str) -> Any:
    """Build a model; the seed of torch is set and not restored."""
    prefix, settings = MODELS[name]
    torch.manual_seed(0)
    config = getattr(transformers, f"{prefix}Config")(**settings)
    return getattr(transformers, f"{prefix}ForConditionalGeneration")(config)


def run_text(model: Any) -> None:
    """One forward and backward of a row of text."""
    ids = torch.arange(3, 14)[None]
    model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits.square().sum().backward()


def without_gradient(model: Any) -> set[str]:
    """Names of the parameters that the backward left without a gradient."""
    return {name for name, parameter in model.named_parameters() if parameter.grad is None}
