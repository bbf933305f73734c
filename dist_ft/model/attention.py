"""Attention over padding-free micro-batches: one document at a time, whatever the kernel.

A micro-batch is one row of T tokens that holds whole documents (or pieces of them) one after another. transformers
would build a dense T x T mask to keep them apart; here the kernel is called once per document instead, so that work
grows with the sum of squared lengths and no mask exists. The documents' lengths reach the attention function as the
keyword argument `document_lengths` of the model's forward.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import MachineError, RequestError
from .isolation import isolation_of

# transformers loads a package for every implementation whose name contains "flash"
DOCUMENTS = {"sdpa": "documents_sdpa", "eager": "documents_eager", "flash_attention_2": "documents_varlen"}

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class AttentionChoice:
    """The attention implementation that `model.attn_implementation` resolved to, and the layout of micro-batches.

    Attributes:
        kernel: flash_attention_2, sdpa or eager.
        implementation: Name of the attention function in transformers.
        padding_free: Whether micro-batches are documents in one row without padding.
        reason: Why this kernel.
        why_padded: Why micro-batches are padded; None if they are not.
        why_single: Why a micro-batch has one row only; None if it can have several.
    """

    kernel: str
    implementation: str
    padding_free: bool
    reason: str
    why_padded: str | None = None
    why_single: str | None = None

    def padded(self, reason: str) -> AttentionChoice:
        """Return the same kernel over padded rows with a mask."""
        why = self.why_padded or reason
        return replace(self, implementation=self.kernel, padding_free=False, why_padded=why)


def choose_attention(
    requested: str,
    model_class: type[PreTrainedModel],
    settings: PreTrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    causal: bool = True,
) -> AttentionChoice:
    """Resolve `auto`, and determine whether documents can be laid out without padding.

    Args:
        requested: `model.attn_implementation`.
        model_class: Class of the model.
        settings: Configuration of the model.
        device: Where the model computes.
        dtype: In which it computes.
        causal: Whether the model is a causal language model; rows of other models are always padded.

    Raises:
        MachineError: FlashAttention is requested by name and cannot run on this machine.
        RequestError: The model does not support the requested implementation.
    """
    missing = _why_no_flash(device, dtype)
    has_flash, has_sdpa = _supports_flash(model_class), getattr(model_class, "_supports_sdpa", False)
    if requested == "flash_attention_2" and missing:
        raise MachineError.of(
            "model.attn_implementation", f"flash_attention_2 {missing}", "set model.attn_implementation=auto or sdpa"
        )
    if (requested == "flash_attention_2" and not has_flash) or (requested == "sdpa" and not has_sdpa):
        raise RequestError.of(
            "model.attn_implementation", f"{model_class.__name__} has no {requested}", "set it to auto or eager"
        )
    if requested != "auto":
        kernel, reason = requested, "as configured"
    elif has_flash and not missing:
        kernel, reason = "flash_attention_2", "the flash-attn package and a GPU are available"
    elif has_sdpa:
        kernel, reason = "sdpa", f"flash_attention_2 {missing or f'is not supported by {model_class.__name__}'}"
    else:
        kernel, reason = "eager", f"{model_class.__name__} supports nothing else"
    if not causal:
        return AttentionChoice(kernel, kernel, False, reason, f"{model_class.__name__} is no causal language model")
    proven = "sdpa" if has_sdpa else "eager"  # the kernels differ in speed only, and flash-attn needs a GPU
    takes_documents = _takes_documents(model_class)
    isolation = isolation_of(model_class, settings, proven, DOCUMENTS[proven] if takes_documents else None)
    if isolation.documents is None:
        return AttentionChoice(kernel, DOCUMENTS[kernel], True, reason, why_single=isolation.padding)
    return AttentionChoice(kernel, kernel, False, reason, isolation.documents, isolation.padding)


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the flash-attn package (pip install flash-attn --no-build-isolation)"
    if dtype not in HALF:
        return "needs model.dtype=bfloat16"
    return None


def _supports_flash(model_class: type[PreTrainedModel]) -> bool:
    """Return whether flash-attn 2 computes the model's attention; models with sinks name other implementations."""
    named = getattr(model_class, "_compatible_flash_implementations", None)
    return getattr(model_class, "_supports_flash_attn", False) and (named is None or "flash_attention_2" in named)


def _takes_documents(model_class: type[PreTrainedModel]) -> bool:
    """Whether keywords reach the attention function and logits can be asked for at chosen positions only."""
    return bool(getattr(model_class, "_supports_attention_backend", False)) and (
        "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )


def _lengths_of(query: Tensor, key: Tensor, keywords: dict[str, Any]) -> tuple[int, ...]:
    """Take `document_lengths` out of the keyword arguments; without it, the row is one document."""
    lengths: tuple[int, ...] = keywords.pop("document_lengths", None) or (key.shape[2],)
    # transformers builds no mask for these implementations, so padding and generated tokens would not be masked
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == sum(lengths), "documents that fill one row"
    return lengths


def _by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    attend: Callable[..., Tensor],
) -> tuple[Tensor, None]:
    """Call `attend(query, key, value)` with [1, heads, n, dim] slices of each document; join [1, n, heads, dim]."""
    pieces = [
        attend(q, k, v)
        for q, k, v in zip(
            query.split(lengths, dim=2), key.split(lengths, dim=2), value.split(lengths, dim=2), strict=True
        )
    ]
    return (pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim=1)), None


def _band(length: int, window: int | None, like: Tensor) -> Tensor:
    """[1, 1, n, n] additive causal mask; with `window`, a token sees itself and the window - 1 before it."""
    distance = torch.arange(length, device=like.device)
    distance = distance[:, None] - distance[None, :]
    hidden = distance < 0
    if window is not None:
        hidden |= distance >= window
    return torch.zeros(length, length, dtype=like.dtype, device=like.device).masked_fill_(
        hidden, torch.finfo(like.dtype).min
    )[None, None]


def _documents_sdpa(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """torch SDPA, document by document. query [1, heads, T, dim]; returns [1, T, heads, dim]."""
    forward = ALL_ATTENTION_FUNCTIONS["sdpa"]
    lengths = _lengths_of(query, key, kwargs)
    window = kwargs.get("sliding_window")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        mask = _band(q.shape[2], window, q) if window is not None and q.shape[2] > window else None
        output: Tensor = forward(module, q, k, v, mask, **kwargs)[0]
        return output

    return _by_document(module, query, key, value, lengths, attend)


def _documents_eager(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """The model's own eager attention (with its sinks or soft cap), document by document."""
    forward = sys.modules[type(module).__module__].eager_attention_forward
    lengths = _lengths_of(query, key, kwargs)
    window = kwargs.get("sliding_window")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = forward(module, q, k, v, _band(q.shape[2], window, q), **kwargs)[0]
        return output

    return _by_document(module, query, key, value, lengths, attend)


def _documents_varlen(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """flash_attn_varlen_func of flash-attn 2, which computes all documents in one call."""
    from flash_attn import flash_attn_varlen_func

    lengths = _lengths_of(query, key, kwargs)
    ends, longest, window = _cumulative(lengths, query.device), max(lengths), kwargs.get("sliding_window")
    dtype = query.dtype if query.dtype in HALF else torch.bfloat16  # rotary embeddings may be in float32
    width = query.shape[-1]
    inputs = [functional.pad(tensor, (0, width - tensor.shape[-1])).to(dtype) for tensor in (query, key, value)]
    output: Tensor = flash_attn_varlen_func(
        *(tensor[0].transpose(0, 1) for tensor in inputs),  # [T, heads, dim]
        cu_seqlens_q=ends,
        cu_seqlens_k=ends,
        max_seqlen_q=longest,
        max_seqlen_k=longest,
        dropout_p=kwargs.get("dropout", 0.0),
        softmax_scale=kwargs.get("scaling"),
        causal=True,
        window_size=(-1, -1) if window is None else (window - 1, 0),
        softcap=kwargs.get("softcap") or 0.0,
    )
    return output[None, ..., : value.shape[-1]].to(query.dtype), None


_latest: tuple[tuple[int, ...], Tensor] | None = None


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[documents + 1] int32 boundaries, kept from layer to layer: a copy to the GPU in every layer would stall it."""
    global _latest
    if _latest is None or _latest[0] != lengths or _latest[1].device != device:
        boundaries = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        _latest = (lengths, boundaries.to(device, non_blocking=True))
    return _latest[1]


def register() -> None:
    """Make the implementations known to transformers, which then builds no mask for them."""
    functions = {"sdpa": _documents_sdpa, "eager": _documents_eager, "flash_attention_2": _documents_varlen}
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS[name], function)


register()
