"""The `model` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Share, Strict, Text


class ModelConfig(Strict):
    """The pretrained model, its tokenizer and its precision."""

    name_or_path: Text = Field(description="Folder, Hub ID, or `package:NAME` (a Python package with the model).")
    revision: str | None = Field(None, description="Hub revision; use a commit hash for reproducible runs.")
    tokenizer: Text | None = Field(None, description="Folder or Hub ID of the tokenizer. Defaults to the model's.")
    add_tokens: list[Annotated[str, Field(pattern=r"^\S+$")]] = Field(
        default_factory=list, description="Special tokens to add to the tokenizer; their embeddings are trained."
    )
    from_scratch: bool = Field(
        False, description="Initialize the weights from train.seed; only config.json and the tokenizer are loaded."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        "auto",
        description="dtype of forward, backward and frozen weights; trained weights and AdamW state stay in float32. "
        "`auto`: bfloat16 on GPUs that compute in it, otherwise that of the checkpoint.",
    )
    quantization: Literal["none", "nf4", "int8"] | None = Field(
        None, description="Format of frozen linear layers. Defaults to nf4 for method=qlora and to none otherwise."
    )
    attn_implementation: Literal[
        "auto",
        "varlen",
        "flash_attention_4",
        "flash_attention_3",
        "flash_attention_2",
        "flex_attention",
        "sdpa",
        "eager",
    ] = Field(
        "auto",
        description="Attention kernel. `auto`: on GPUs the first of flash_attention_4, flash_attention_3, varlen (of "
        "torch itself), flash_attention_2 and flex_attention that computes the model, otherwise sdpa or eager.",
    )
    dropout: Share | None = Field(None, description="Sets all dropout rates. Defaults to the model's own rates.")
    gradient_checkpointing: bool = Field(False, description="Recompute each block's activations in the backward pass.")
    trust_remote_code: bool = Field(False, description="Run Python code from the model folder. Review it first.")
