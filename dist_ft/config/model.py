"""The `model` group."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from .strict import Share, Strict


class ModelConfig(Strict):
    """Which model, in which precision."""

    name_or_path: str = Field(description="Folder, hub id, or `package:NAME` (a Python package that carries a GGUF).")
    revision: str | None = Field(None, description="Hub revision; a commit hash makes the run repeatable.")
    tokenizer: str | None = Field(None, description="Folder or hub id of the tokenizer; the model's own if not given.")
    add_tokens: list[Annotated[str, Field(pattern=r"^\S+$")]] = Field(
        default_factory=list, description="Special tokens that the tokenizer gets; their embeddings learn."
    )
    from_scratch: bool = Field(
        False, description="Weights drawn from train.seed; of the folder only config.json and the tokenizer are read."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32", description="Forward and backward, and frozen weights; trained weights and AdamW stay in float32."
    )
    quantization: Literal["none", "nf4", "int8"] | None = Field(
        None, description="Of the frozen linear layers; if not given, nf4 for method=qlora and none otherwise."
    )
    attn_implementation: Literal["auto", "flash_attention_2", "sdpa", "eager"] = "auto"
    dropout: Share | None = Field(None, description="Every rate of dropout of the model; its own if not given.")
    gradient_checkpointing: bool = Field(False, description="Recompute activations block by block in the backward.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model. Read it first.")
