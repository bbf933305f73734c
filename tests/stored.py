"""Folders whose weights are quantized in the files, and the same weights dequantized by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bitsandbytes.functional as bnb
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from dist_ft.testing import tiny

BLOCK = 32  # rows and columns that share a scale in FP8; the tiny models' matrices end with a part of one
FP4_VALUES = torch.tensor([0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0])
WEIGHTS = "model.safetensors"


def save_fp8(name: str, folder: Path, **changes: Any) -> tuple[str, str]:
    """Save a tiny model in FP8 as DeepSeek-V3 and Qwen3-FP8 are, and dequantized; return both folders."""
    plain, packed = folder / "plain", folder / "fp8"
    for path in (plain, packed):
        tiny.save(name, path, **changes)
    found, stored = load_file(plain / WEIGHTS), {}
    for key, weight in list(found.items()):
        if ".layers." not in key or not key.endswith("proj.weight"):
            stored[key] = weight
            continue
        codes, scales = torch.empty_like(weight, dtype=torch.float8_e4m3fn), torch.empty(grid_of(weight))
        for i in range(scales.shape[0]):
            for j in range(scales.shape[1]):
                at = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
                scales[i, j] = weight[at].abs().max() / 448 * (1 + 0.1 * i + 0.2 * j)
                codes[at] = (weight[at] / scales[i, j]).to(torch.float8_e4m3fn)
                found[key][at] = codes[at].float() * scales[i, j]
        stored |= {key: codes, f"{key}_scale_inv": scales}
    save_file(found, plain / WEIGHTS, metadata={"format": "pt"})
    save_file(stored, packed / WEIGHTS, metadata={"format": "pt"})
    describe(packed, {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [BLOCK, BLOCK]})
    return str(plain), str(packed)


def grid_of(weight: Tensor) -> tuple[int, int]:
    """Blocks of a matrix, the last ones cut off."""
    return -(-weight.shape[0] // BLOCK), -(-weight.shape[1] // BLOCK)


def save_mxfp4(folder: Path) -> tuple[str, str]:
    """Save a tiny GPT-OSS whose experts are in MXFP4, and dequantized; return both folders."""
    plain, packed = folder / "plain", folder / "mxfp4"
    for path in (plain, packed):
        tiny.save("gpt_oss", path, hidden_size=32, intermediate_size=32)
    found, stored = load_file(plain / WEIGHTS), {}
    generator = torch.Generator().manual_seed(0)
    for key, weight in list(found.items()):
        if not key.endswith(("gate_up_proj", "down_proj")):
            stored[key] = weight
            continue
        experts, width, out = weight.shape  # the file has [experts, out, blocks, 16] bytes, two codes in each
        codes = torch.randint(16, (experts, out, width // 32, 32), generator=generator)
        exponents = torch.randint(120, 125, (experts, out, width // 32), generator=generator)
        values = FP4_VALUES[codes] * torch.exp2(exponents.float() - 127)[..., None]
        found[key] = values.reshape(experts, out, width).transpose(1, 2).contiguous()
        stored[f"{key}_blocks"] = (codes[..., ::2] + 16 * codes[..., 1::2]).to(torch.uint8)
        stored[f"{key}_scales"] = exponents.to(torch.uint8)
    save_file(found, plain / WEIGHTS, metadata={"format": "pt"})
    save_file(stored, packed / WEIGHTS, metadata={"format": "pt"})
    describe(packed, {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "lm_head"]})
    return str(plain), str(packed)


def save_bitsandbytes(folder: Path, bits: int) -> tuple[str, str]:
    """Save a tiny Llama as bitsandbytes does, and its weights as bitsandbytes unpacks them; return both folders."""
    plain, packed = folder / "plain", folder / "bitsandbytes"
    tiny.save("llama", plain, hidden_size=64, intermediate_size=128, num_key_value_heads=4)
    settings = BitsAndBytesConfig(load_in_4bit=bits == 4, load_in_8bit=bits == 8, bnb_4bit_quant_type="nf4")
    model: Any = AutoModelForCausalLM.from_pretrained(plain, quantization_config=settings, dtype=torch.float32)
    model.save_pretrained(packed)
    found = load_file(plain / WEIGHTS)
    for name, module in model.named_modules():
        if f"{name}.weight" in found and type(module).__name__.startswith("Linear") and ".layers." in name:
            packed_weight = module.weight
            if bits == 4:
                found[f"{name}.weight"] = bnb.dequantize_4bit(packed_weight.data, packed_weight.quant_state)
            else:  # codes times the largest magnitude of a row
                found[f"{name}.weight"] = packed_weight.CB.float() * packed_weight.SCB[:, None] / 127
    save_file(found, plain / WEIGHTS, metadata={"format": "pt"})
    return str(plain), str(packed)


def describe(folder: Path, quantization: dict[str, Any]) -> None:
    """Say in config.json how the weights are quantized."""
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "quantization_config": quantization}))
