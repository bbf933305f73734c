"""Kernels that compute the attention of all documents of a row in one call, behind one signature.

Each takes query `[T, heads, dim]`, key `[T, kv_heads, dim]` and value `[T, kv_heads, value_dim]`, the boundaries of the
documents and a `Form`, and returns `[T, heads, value_dim]`. Attention is causal within each document.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

from .boundaries import Boundaries

HALF = (torch.bfloat16, torch.float16)


@dataclass(frozen=True, eq=False)
class Form:
    """How scores become weights.

    Attributes:
        scale: Factor of the products of query and key; 1 / sqrt(dim) if None.
        window: A token sees itself and the `window` - 1 tokens before it; all of them if None.
        softcap: Scores s become softcap * tanh(s / softcap) (Gemma 2).
        sinks: A further score of each head, which takes weight and has no value, `[heads]` (GPT-OSS).
        dropout: Rate of dropout on the weights.
    """

    scale: float | None = None
    window: int | None = None
    softcap: float | None = None
    sinks: Tensor | None = None
    dropout: float = 0.0

    def scale_of(self, query: Tensor) -> float:
        """Return the factor of the products, explicit because kernels may see padded vectors."""
        return float(query.shape[-1] ** -0.5 if self.scale is None else self.scale)


Kernel = Callable[[Tensor, Tensor, Tensor, Boundaries, Form], Tensor]


def varlen(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, form: Form) -> Tensor:
    """`torch.nn.attention.varlen.varlen_attn`: FlashAttention as torch contains it, or FA3 or FA4 if activated."""
    from torch.nn.attention.varlen import varlen_attn

    assert form.softcap is None and form.sinks is None and not form.dropout, "varlen_attn has none of them"
    q, k, v = _even(query, key, value, to_multiple_of=8)
    output = varlen_attn(
        q,
        k,
        v,
        boundaries.ends,
        boundaries.ends,
        boundaries.longest,
        boundaries.longest,
        scale=form.scale_of(query),
        window_size=(-1, 0) if form.window is None else (form.window - 1, 0),
        enable_gqa=query.shape[1] != key.shape[1],
    )
    assert isinstance(output, Tensor), "no auxiliary outputs were asked for"
    return output[..., : value.shape[-1]].to(query.dtype)


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, form: Form) -> Tensor:
    """`flash_attn_varlen_func` of the package flash-attn 2."""
    from flash_attn import flash_attn_varlen_func

    assert form.sinks is None, "flash-attn 2 has no sinks"
    q, k, v = _even(query, key, value)
    output: Tensor = flash_attn_varlen_func(
        q,
        k,
        v,
        cu_seqlens_q=boundaries.ends,
        cu_seqlens_k=boundaries.ends,
        max_seqlen_q=boundaries.longest,
        max_seqlen_k=boundaries.longest,
        dropout_p=form.dropout,
        softmax_scale=form.scale_of(query),
        causal=True,
        window_size=(-1, -1) if form.window is None else (form.window - 1, 0),
        softcap=form.softcap or 0.0,
    )
    return output[..., : value.shape[-1]].to(query.dtype)


def reference(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, form: Form) -> Tensor:
    """The plain formula, document by document, in float32; kernels are compared with it before they are used."""
    outputs = []
    parts = zip(*(tensor.float().split(boundaries.lengths) for tensor in (query, key, value)), strict=True)
    for part in parts:
        q, k, v = (tensor.transpose(0, 1) for tensor in part)
        groups = q.shape[0] // k.shape[0]
        scores = q @ k.repeat_interleave(groups, 0).transpose(1, 2) * form.scale_of(q)
        if form.softcap is not None:
            scores = form.softcap * torch.tanh(scores / form.softcap)
        distance = torch.arange(q.shape[1], device=q.device)
        distance = distance[:, None] - distance
        hidden = (distance < 0) if form.window is None else (distance < 0) | (distance >= form.window)
        scores = scores.masked_fill(hidden, float("-inf"))
        if form.sinks is not None:
            sinks = form.sinks.float()[:, None, None].expand(-1, q.shape[1], 1)
            scores = torch.cat([scores, sinks], dim=-1)
        weights = scores.softmax(dim=-1)[..., : k.shape[1]]
        outputs.append((weights @ v.repeat_interleave(groups, 0)).transpose(0, 1))
    return torch.cat(outputs).to(query.dtype)


def _even(query: Tensor, key: Tensor, value: Tensor, to_multiple_of: int = 1) -> tuple[Tensor, Tensor, Tensor]:
    """Give query, key and value one width and a half-precision dtype: rotary embeddings may be in float32."""
    width = -(-max(query.shape[-1], value.shape[-1]) // to_multiple_of) * to_multiple_of
    dtype = query.dtype if query.dtype in HALF else torch.bfloat16
    q, k, v = (functional.pad(t, (0, width - t.shape[-1])).to(dtype) for t in (query, key, value))
    return q, k, v
