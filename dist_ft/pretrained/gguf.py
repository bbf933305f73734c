"""A GGUF file turned into a Hugging Face folder, once: every rank then reads safetensors, which takes a moment.

Quantised weights are exact in float32, so that nothing is lost on the way.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path

from ..errors import MachineError, RequestError

FLOAT32_OF_GGUF = 8  # times the file's size that the folder may take: 4-bit weights become 32-bit ones


def convert(gguf: Path, out: Path) -> None:
    """Write config.json, safetensors (float32), tokenizer and chat template of `gguf` into the folder `out`.

    Raises:
        MachineError: the package gguf is missing.
        RequestError: transformers cannot read the file.
    """
    if importlib.util.find_spec("gguf") is None:
        raise MachineError.of(
            "gguf", "the Python package is not installed, and the model is a GGUF", "pip install gguf"
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
    from transformers.utils import logging

    logging.disable_progress_bar()
    try:
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        # Without dequantize the model counts as quantised, and transformers refuses to train or to save it.
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.float32,
            quantization_config=GgufConfig(dequantize=True),
        )
    except (OSError, ValueError, KeyError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        way_out = "name a safetensors folder of the model instead"
        raise RequestError.of(str(gguf), f"transformers cannot read this GGUF ({reason})", way_out) from error
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)
