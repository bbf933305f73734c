"""Conversion of a GGUF file to a Hugging Face folder, so that every rank loads safetensors, which is fast.

The dequantized weights are exact in float32, so the conversion is lossless.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import MachineError, RequestError

FLOAT32_OF_GGUF = 8  # maximum size of the folder relative to the file: 4-bit weights become 32-bit weights


def convert(gguf: Path, out: Path) -> None:
    """Write config.json, safetensors (float32), tokenizer and chat template of `gguf` to the folder `out`.

    Raises:
        MachineError: If the package gguf is not installed.
        RequestError: If transformers cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MachineError.of(
            "gguf", "the Python package is not installed, but the model is a GGUF file", "run pip install gguf"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Without dequantize, transformers treats the model as quantized and refuses to train or save it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "use a folder with the safetensors version of the model"
        raise RequestError.of(str(gguf), f"transformers cannot read this GGUF ({reason})", way_out) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
