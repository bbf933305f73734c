"""Attention over padding-free micro-batches: one document at a time, whatever the kernel.

A micro-batch is one row of T tokens that holds whole documents (or pieces of them) one after another. transformers
would build a dense T x T mask to keep them apart; here the kernel of the model is called once a document instead, so
work grows with the sum of squared lengths and no mask exists. The documents' lengths reach the attention function as
the keyword argument `document_lengths` of the model's forward.
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
from transformers import PreTrainedModel
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..errors import MachineError, RequestError

DOCUMENTS = {name: f"documents_{name}" for name in ("sdpa", "eager", "flash_attention_2")}


@dataclass(frozen=True)
class AttentionChoice:
    """What `model.attn_implementation` became, and why."""

    kernel: str  # flash_attention_2, sdpa, eager
    implementation: str  # what transformers is told
    padding_free: bool
    reason: str

    def padded(self) -> AttentionChoice:
        """The same kernel over padded rows with a mask."""
        return replace(self, implementation=self.kernel, padding_free=False)


def choose_attention(
    requested: str, model_class: type[PreTrainedModel], device: torch.device, dtype: torch.dtype
) -> AttentionChoice:
    """Resolve `auto`, and whether documents can be laid out without padding.

    Raises:
        MachineError: FlashAttention was asked for by name, and cannot run here.
        RequestError: the model has no such attention.
    """
    missing = _why_no_flash(device, dtype)
    has_flash = getattr(model_class, "_supports_flash_attn", False)
    has_sdpa = getattr(model_class, "_supports_sdpa", False)
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
        kernel, reason = "flash_attention_2", "the flash-attn package and a GPU are there"
    elif has_sdpa:
        kernel, reason = "sdpa", f"flash_attention_2 {missing or f'is not supported by {model_class.__name__}'}"
    else:
        kernel, reason = "eager", f"{model_class.__name__} supports nothing else"
    padding_free = _takes_documents(model_class)
    return AttentionChoice(kernel, DOCUMENTS[kernel] if padding_free else kernel, padding_free, reason)


def _why_no_flash(device: torch.device, dtype: torch.dtype) -> str | None:
    if device.type != "cuda":
        return "needs a GPU"
    if importlib.util.find_spec("flash_attn") is None:
        return "needs the flash-attn package (pip install flash-attn --no-build-isolation)"
    if dtype not in (torch.bfloat16, torch.float16):
        return "needs model.dtype=bfloat16"
    return None


def _takes_documents(model_class: type[PreTrainedModel]) -> bool:
    """Whether keywords reach the attention function and logits can be asked for at chosen positions only."""
    return bool(getattr(model_class, "_supports_attention_backend", False)) and (
        "logits_to_keep" in inspect.signature(model_class.forward).parameters
    )


def _by_document(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    lengths: tuple[int, ...],
    attend: Callable[..., Tensor],
) -> tuple[Tensor, None]:
    """Call `attend(query, key, value)` with [1, heads, n, dim] slices of each document; join [1, n, heads, dim]."""
    assert query.shape[0] == 1 and query.shape[2] == sum(lengths), "one row that the documents fill"
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
    lengths = kwargs.pop("document_lengths", None)
    if lengths is None:  # generation and padded batches
        return forward(module, query, key, value, attention_mask, **kwargs)
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
    lengths = kwargs.pop("document_lengths", None)
    if lengths is None:
        return forward(module, query, key, value, attention_mask, **kwargs)
    window = kwargs.get("sliding_window")

    def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        output: Tensor = forward(module, q, k, v, _band(q.shape[2], window, q), **kwargs)[0]
        return output

    return _by_document(module, query, key, value, lengths, attend)


def _documents_flash(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """FlashAttention's variable-length kernel, which takes all documents in one call."""
    lengths = kwargs.pop("document_lengths", None)
    if lengths is not None:
        ends = _cumulative(lengths, query.device)
        longest = max(lengths)
        kwargs |= {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": longest, "max_length_k": longest}
    return ALL_ATTENTION_FUNCTIONS["flash_attention_2"](module, query, key, value, attention_mask, **kwargs)


_latest: tuple[tuple[int, ...], Tensor] | None = None


def _cumulative(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """[documents + 1] int32 boundaries. Kept from layer to layer: a copy to the GPU per layer would stall it."""
    global _latest
    if _latest is None or _latest[0] is not lengths or _latest[1].device != device:
        boundaries = torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        _latest = (lengths, boundaries.to(device, non_blocking=True))
    return _latest[1]


def register() -> None:
    """Make the implementations known to transformers, which then builds no mask for them."""
    functions = {"sdpa": _documents_sdpa, "eager": _documents_eager, "flash_attention_2": _documents_flash}
    for name, function in functions.items():
        ALL_ATTENTION_FUNCTIONS.register(DOCUMENTS[name], function)


register()
