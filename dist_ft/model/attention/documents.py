"""The attention functions that transformers calls for a padding-free row, one for each kernel.

A micro-batch is one row of T tokens that holds whole documents (or pieces of them) one after another. transformers
would build a dense T x T mask to keep them apart; here kernels get the lengths of the documents instead, so that work
grows with the sum of squared lengths and no mask exists. The lengths reach the attention function as the keyword
argument `document_lengths` of the model's forward. On CPUs a kernel is called once per document; a GPU would wait for
so many launches, so that its kernels compute all documents in one call.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from . import flex, kernels
from .boundaries import boundaries_of

# transformers loads a package for every implementation whose name contains "flash"
DOCUMENTS = {
    "varlen": "documents_varlen",
    "flash_attention_4": "documents_varlen",
    "flash_attention_3": "documents_varlen",
    "flash_attention_2": "documents_fa2",
    "flex_attention": "documents_flex",
    "sdpa": "documents_sdpa",
    "eager": "documents_eager",
}
KERNELS: dict[str, kernels.Kernel] = {
    "documents_varlen": kernels.varlen,
    "documents_fa2": kernels.flash_attention_2,
    "documents_flex": flex.flex_attention,
}
REFERENCE = "documents_reference"  # shows on a miniature whether kernels of one call are given all that they need
SOFTCAP, SINKS, BIAS = "soft caps", "sinks", "position biases"
ASKS = {"softcap": SOFTCAP, "s_aux": SINKS, "position_bias": BIAS}

_asked: set[str] | None = None


@contextlib.contextmanager
def asking() -> Iterator[set[str]]:
    """Return a context in which a set collects what a model's attention asks for, besides scale and window."""
    global _asked
    _asked = set()
    try:
        yield _asked
    finally:
        _asked = None


def _lengths_of(query: Tensor, key: Tensor, keywords: dict[str, Any]) -> tuple[int, ...]:
    """Take `document_lengths` out of the keyword arguments; without it, the row is one document."""
    lengths: tuple[int, ...] = keywords.pop("document_lengths", None) or (key.shape[2],)
    # transformers builds no mask for these implementations, so padding and generated tokens would not be masked
    assert query.shape[0] == 1 and query.shape[2] == key.shape[2] == sum(lengths), "documents that fill one row"
    if _asked is not None:
        _asked.update(what for name, what in ASKS.items() if keywords.get(name) is not None)
    return lengths


def _in_one_call(kernel: kernels.Kernel) -> Callable[..., tuple[Tensor, None]]:
    """Return the attention function of a kernel that computes all documents in one call."""

    def attend(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
    ) -> tuple[Tensor, None]:
        boundaries = boundaries_of(_lengths_of(query, key, kwargs), query.device)
        assert kwargs.get("position_bias") is None, "no kernel for documents has position biases"
        form = kernels.Form(
            scale=kwargs.get("scaling"),
            window=kwargs.get("sliding_window"),
            softcap=kwargs.get("softcap"),
            sinks=kwargs.get("s_aux"),
            dropout=kwargs.get("dropout") or 0.0,
        )
        q, k, v = (tensor[0].transpose(0, 1) for tensor in (query, key, value))
        return kernel(q, k, v, boundaries, form)[None], None

    return attend


def _by_document(
    query: Tensor, key: Tensor, value: Tensor, lengths: tuple[int, ...], attend: Callable[..., Tensor]
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

    return _by_document(query, key, value, lengths, attend)


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

    return _by_document(query, key, value, lengths, attend)


def register() -> None:
    """Make the implementations known to transformers, which then builds no mask for them."""
    functions = {"documents_sdpa": _documents_sdpa, "documents_eager": _documents_eager}
    in_one_call = {name: _in_one_call(kernel) for name, kernel in (KERNELS | {REFERENCE: kernels.reference}).items()}
    for name, function in (functions | in_one_call).items():
        ALL_ATTENTION_FUNCTIONS.register(name, function)


register()
