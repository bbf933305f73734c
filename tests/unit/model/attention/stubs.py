"""Stand-ins for kernels that need a GPU: they check every argument as the real ones do and compute by plain softmax."""

from __future__ import annotations

import importlib.machinery
import itertools
import math
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.library import Library

from dist_ft.model.attention import available


def attend(q: Tensor, k: Tensor, v: Tensor, ends: list[int], scale: float, left: int, softcap: float) -> Tensor:
    """Causal attention of each document, [tokens, heads, dim]; `left` tokens before itself are seen, -1 for all."""
    groups, outputs = q.shape[1] // k.shape[1], []
    for start, end in itertools.pairwise(ends):
        query, key, value = (t[start:end].float().transpose(0, 1) for t in (q, k, v))
        key, value = key.repeat_interleave(groups, 0), value.repeat_interleave(groups, 0)
        scores = query @ key.transpose(1, 2) * scale
        scores = softcap * torch.tanh(scores / softcap) if softcap else scores
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        hidden = (distance < 0) | ((distance > left) if left >= 0 else False)
        outputs.append((scores.masked_fill(hidden, -math.inf).softmax(-1) @ value).transpose(0, 1))
    return torch.cat(outputs).to(q.dtype)


def check(q: Tensor, k: Tensor, v: Tensor, ends_q: Tensor, ends_k: Tensor, longest_q: int, longest_k: int) -> list[int]:
    """Check what all versions of FlashAttention demand of documents; return their boundaries."""
    assert q.dtype == k.dtype == v.dtype and q.dtype in (torch.bfloat16, torch.float16)
    assert q.dim() == k.dim() == v.dim() == 3 and q.shape[0] == k.shape[0] == v.shape[0]
    assert q.shape[-1] == k.shape[-1] == v.shape[-1] <= 256
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1, "the last dimension is contiguous"
    assert q.shape[1] % k.shape[1] == 0 and k.shape[1] == v.shape[1]
    assert ends_q.dtype == ends_k.dtype == torch.int32 and ends_q.is_contiguous() and ends_q.device == q.device
    ends: list[int] = ends_q.tolist()
    assert ends == ends_k.tolist() and ends[0] == 0 and ends[-1] == q.shape[0]
    assert longest_q == longest_k == max(b - a for a, b in itertools.pairwise(ends))
    return ends


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """The function of flash-attn 2.8 with its rules."""
    ends = check(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    assert causal and 0 <= dropout_p < 1 and window_size[1] in (-1, 0)
    return attend(q, k, v, ends, softmax_scale or 1 / math.sqrt(q.shape[-1]), window_size[0], softcap)


def flash_forward(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    return_debug_mask: bool,
    *,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
    **others: Any,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_forward` on documents with its rules (flash_api.cpp of torch, mha_varlen_fwd)."""
    ends = check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert query.shape[-1] % 8 == 0, "must be a multiple of 8"
    assert dropout_p == 0 and not return_debug_mask and all(other is None for other in others.values())
    assert is_causal == ((window_size_left, window_size_right) == (-1, 0)) and window_size_right == 0
    assert scale is not None and window_size_left is not None
    output = attend(query, key, value, ends, scale, window_size_left, 0.0)
    sums = torch.zeros(query.shape[1], query.shape[0])
    return output, sums, torch.zeros(2, dtype=torch.uint64), torch.zeros(()), torch.zeros(0)


def flash_backward(
    grad_out: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    out: Tensor,
    logsumexp: Tensor,
    cum_seq_q: Tensor,
    cum_seq_k: Tensor,
    max_q: int,
    max_k: int,
    dropout_p: float,
    is_causal: bool,
    *others: Tensor,
    scale: float | None = None,
    window_size_left: int | None = None,
    window_size_right: int | None = None,
) -> tuple[Tensor, ...]:
    """`aten::_flash_attention_backward`."""
    assert grad_out.dtype == query.dtype and grad_out.stride(-1) == 1 and grad_out.shape == out.shape
    ends = check(query, key, value, cum_seq_q, cum_seq_k, max_q, max_k)
    assert scale is not None and window_size_left is not None and dropout_p == 0
    found: list[list[Tensor]] = []
    groups = query.shape[1] // key.shape[1]
    for start, end in itertools.pairwise(ends):  # by hand: autograd records nothing inside the backward of an operator
        q, k, v, along = (t[start:end].float().transpose(0, 1) for t in (query, key, value, grad_out))
        k, v = k.repeat_interleave(groups, 0), v.repeat_interleave(groups, 0)
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)[None]
        hidden = (distance < 0) | ((distance > window_size_left) if window_size_left >= 0 else False)
        weights = (q @ k.transpose(1, 2) * scale).masked_fill(hidden, -math.inf).softmax(-1)
        change = along @ v.transpose(1, 2)
        scores = weights * (change - (change * weights).sum(-1, keepdim=True)) * scale
        parts = [scores @ k, scores.transpose(1, 2) @ q, weights.transpose(1, 2) @ along]
        parts[1:] = [part.unflatten(0, (-1, groups)).sum(1) for part in parts[1:]]
        found.append([part.transpose(0, 1) for part in parts])
    return tuple(torch.cat(pieces).to(query.dtype) for pieces in zip(*found, strict=True))


@pytest.fixture
def torch_flash() -> Iterator[None]:
    """Give torch's FlashAttention an implementation for CPU tensors."""
    library = Library("aten", "IMPL")
    library.impl("_flash_attention_forward", flash_forward, "CPU")
    library.impl("_flash_attention_backward", flash_backward, "CPU")
    yield
    library._destroy()


@pytest.fixture
def flash_attn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Install the package flash-attn 2."""
    module: Any = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "flash_attn", module)


@pytest.fixture
def flex(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute FlexAttention without compiling it, and with gradients on the CPU, which its front end refuses."""
    from torch.nn.attention import flex_attention

    from dist_ft.model.attention import flex as module

    monkeypatch.setattr(flex_attention, "_validate_device", lambda *_: None)
    monkeypatch.setattr(flex_attention, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(module, "_compiled", lambda: flex_attention.flex_attention)
    is_there = available._is_there
    monkeypatch.setattr(available, "_is_there", lambda module: module == "triton" or is_there(module))


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> Iterator[torch.device]:
    """A device on which kernels are tried with CPU tensors."""
    attempt = available._try
    monkeypatch.setattr(available, "_try", lambda f, heads, _, dtype: attempt(f, heads, torch.device("cpu"), dtype))
    cudnn = torch.backends.cuda.cudnn_sdp_enabled()
    yield torch.device("cuda")
    torch.backends.cuda.enable_cudnn_sdp(cudnn)
