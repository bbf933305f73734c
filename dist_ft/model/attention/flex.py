"""FlexAttention over documents, for what FlashAttention lacks: sinks and soft caps.

Blocks of 128 x 128 scores that no token pair needs are skipped. Which ones these are follows from the lengths of the
documents, so it is computed on the host, without a matrix of all pairs and without reading from the device.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from .boundaries import Boundaries
from .kernels import Form

BLOCK = 128


def flex_attention(query: Tensor, key: Tensor, value: Tensor, boundaries: Boundaries, form: Form) -> Tensor:
    """`torch.nn.attention.flex_attention`, compiled; see `kernels` for the signature.

    Rows are padded to whole blocks, since every other length would compile another kernel.
    """
    from torch.nn.attention.flex_attention import AuxRequest

    assert not form.dropout, "FlexAttention has no dropout"
    tokens = query.shape[0]
    rest = -tokens % BLOCK
    inputs = [functional.pad(t.transpose(0, 1)[None], (0, 0, 0, rest)) for t in (query, key, value)]
    output, aux = _compiled()(
        *inputs,
        score_mod=_cap(form.softcap) if form.softcap else None,
        block_mask=_mask(boundaries, rest, form.window),
        scale=form.scale_of(query),
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    if form.sinks is not None:  # the sink takes its share of the weights: exp(lse) / (exp(lse) + exp(sink))
        output = output * torch.sigmoid(aux.lse - form.sinks.float()[:, None])[..., None].to(output.dtype)
    return output[0, :, :tokens].transpose(0, 1)


@functools.cache
def _compiled() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention as flex

    # `fullgraph`: with too many variants it fails, instead of computing a matrix of all pairs
    return torch.compile(flex, dynamic=True, fullgraph=True)


def _cap(softcap: float) -> Callable[..., Tensor]:
    def cap(score: Tensor, batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return softcap * torch.tanh(score / softcap)

    return cap


def _mask(boundaries: Boundaries, rest: int, window: int | None) -> Any:
    """Return the BlockMask of a micro-batch; all layers with the same window share it."""
    if window not in boundaries.masks:
        lengths = (*boundaries.lengths, rest) if rest else boundaries.lengths  # padding is one more document
        boundaries.masks[window] = _make_mask(lengths, boundaries.device, window)
    return boundaries.masks[window]


def _make_mask(lengths: tuple[int, ...], device: torch.device, window: int | None) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    boundaries = Boundaries(lengths, device)
    numbers, reach = boundaries.documents, sum(lengths) if window is None else window

    def sees(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (numbers[query] == numbers[key]) & (query >= key) & (query - key < reach)

    partial, full = needed_blocks(lengths, reach)
    mask = BlockMask.from_kv_blocks(
        *_listed(partial), *_listed(full), BLOCK_SIZE=BLOCK, mask_mod=sees, seq_lengths=(sum(lengths), sum(lengths))
    )
    return mask if device.type == "cpu" else mask.to(device)


def needed_blocks(lengths: tuple[int, ...], window: int) -> tuple[np.ndarray, np.ndarray]:
    """Return which blocks are needed in part, and which in full, `[blocks, blocks]` bool, queries in rows.

    Args:
        lengths: Tokens of each document; their sum is a multiple of `BLOCK`.
        window: A token sees at most itself and the `window` - 1 tokens before it.
    """
    starts = np.repeat(np.cumsum([0, *lengths[:-1]]), lengths)  # of each token's document
    first = np.arange(0, len(starts), BLOCK)
    last = first + BLOCK - 1
    earliest = np.maximum(starts[first], first - window + 1)  # that any token of the block sees
    needed = (last[None] >= earliest[:, None]) & (first[None] <= last[:, None])
    one_document = starts[last][:, None] <= first[None]  # that of the last query, so that of all queries and keys
    full = needed & one_document & (last[None] <= first[:, None]) & (last[:, None] - first[None] < window)
    return needed & ~full, full


def _listed(blocks: np.ndarray) -> tuple[Tensor, Tensor]:
    """Return the number of blocks of each row, `[1, 1, rows]`, and their indices first, `[1, 1, rows, rows]`."""
    order = np.argsort(~blocks, axis=1, kind="stable").astype(np.int32)
    return torch.from_numpy(blocks.sum(axis=1).astype(np.int32))[None, None], torch.from_numpy(order)[None, None]
