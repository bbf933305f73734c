"""Packing of weights: NF4 with double quantization (Dettmers et al. 2023) and int8 rows (Dettmers et al. 2022).

bitsandbytes quantizes and dequantizes; only the layout is our own. Codes and statistics of a weight are concatenated in
a flat tensor, which is viewed as the compute dtype, so that code that casts parameters to that dtype leaves it as is.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from ...errors import MachineError

BLOCK = 64  # number of weights that share a statistic
STATISTICS_BLOCK = 256  # number of statistics that share a second-level statistic (double quantization)
CHUNK = 2**28  # weights quantized at once: bounds the float32 copy and the 32-bit indices of the kernels


def packed_bytes(scheme: str, shape: tuple[int, ...]) -> int:
    """Return the size of a packed weight of this shape in bytes, including statistics."""
    return sum(sum(_part_bytes(scheme, rows, shape[-1])) for rows in _chunks(shape))


def packed_size(scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> int:
    """Return the number of elements of `dtype` that hold a packed weight."""
    return math.ceil(packed_bytes(scheme, shape) / dtype.itemsize)


def pack(weight: Tensor, scheme: str, dtype: torch.dtype) -> Tensor:
    """Pack `weight`, `[..., columns]`, into a flat tensor viewed as `dtype`."""
    rows = weight.detach().reshape(-1, weight.shape[-1]).split(list(_chunks(tuple(weight.shape))))
    parts = [part for chunk in rows for part in (_pack_nf4 if scheme == "nf4" else _pack_int8)(chunk.float())]
    data = torch.cat([part.contiguous().view(torch.uint8).flatten() for part in parts])
    room = packed_size(scheme, tuple(weight.shape), dtype) * dtype.itemsize
    return functional.pad(data, (0, room - data.numel())).view(dtype)


def unpack(bits: Tensor, scheme: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Unpack the result of `pack` to a weight of this shape in `dtype`.

    Peak memory is the weight and one chunk.
    """
    data, start, first = bits.detach().view(torch.uint8), 0, 0
    unpack_rows = _unpack_nf4 if scheme == "nf4" else _unpack_int8
    chunks = list(_chunks(shape))
    weight = torch.empty((sum(chunks), shape[-1]), dtype=dtype, device=bits.device) if len(chunks) > 1 else None
    for rows in chunks:
        sizes = _part_bytes(scheme, rows, shape[-1])
        found = unpack_rows(data[start : start + sum(sizes)].split(sizes), (rows, shape[-1]), dtype)
        if weight is None:
            return found.view(shape)
        weight[first : first + rows] = found
        start, first = start + sum(sizes), first + rows
        del found  # before the next chunk is unpacked
    assert weight is not None, "a weight has rows"
    return weight.view(shape)


def import_bitsandbytes() -> Any:
    """Import and return `bitsandbytes.functional`.

    Raises:
        MachineError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes.functional
    except ImportError as error:
        raise MachineError.of(
            "model.quantization", "needs the package bitsandbytes", "pip install bitsandbytes"
        ) from error
    return bitsandbytes.functional


def _chunks(shape: tuple[int, ...]) -> Iterator[int]:
    """Yield the number of rows of each chunk that is quantized at once; usually, there is only one chunk."""
    rows, most = math.prod(shape[:-1]), max(1, CHUNK // shape[-1])
    yield from (min(most, rows - start) for start in range(0, rows, most))


def _part_bytes(scheme: str, rows: int, columns: int) -> list[int]:
    """Return the sizes of the codes and statistics of a chunk in bytes, in order."""
    if scheme == "int8":
        return [rows * columns, 4 * rows]
    blocks = math.ceil(rows * columns / BLOCK)
    return [math.ceil(rows * columns / 2), blocks, 4 * math.ceil(blocks / STATISTICS_BLOCK), 4]


def _pack_nf4(weight: Tensor) -> list[Tensor]:
    """Return 4-bit codes, 8-bit block statistics, their float32 second-level statistics, and a float32 offset."""
    codes, state = import_bitsandbytes().quantize_4bit(
        weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
    )
    return [codes, state.absmax, state.state2.absmax.float(), state.offset.float().reshape(1)]


def _unpack_nf4(parts: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    bnb = import_bitsandbytes()
    codes, absmax, scales, offset = parts
    dynamic_map, nf4_values = _tables(codes.device)
    statistics = bnb.QuantState(
        absmax=_as_float(scales), code=dynamic_map, blocksize=STATISTICS_BLOCK, dtype=torch.float32
    )
    state = bnb.QuantState(
        absmax=absmax.contiguous(), shape=torch.Size(shape), code=nf4_values,
        blocksize=BLOCK, quant_type="nf4", dtype=dtype, offset=_as_float(offset)[0], state2=statistics,
    )  # fmt: skip
    weight: Tensor = bnb.dequantize_4bit(codes.reshape(-1, 1), state)
    return weight.reshape(shape)


@lru_cache(maxsize=4)
def _tables(device: torch.device) -> tuple[Tensor, Tensor]:
    """Return the 256 values of an 8-bit statistic and the 16 values of NF4."""
    bnb = import_bitsandbytes()
    return bnb.create_dynamic_map().to(device), bnb.get_4bit_type("nf4", device=device)


def _pack_int8(weight: Tensor) -> list[Tensor]:
    """Scale the largest magnitude of each row to 127, as `int8_vectorwise_quant` of bitsandbytes without outliers."""
    statistics = weight.abs().amax(dim=1).clamp_min(1e-12)
    return [torch.round(weight * (127.0 / statistics[:, None])).to(torch.int8), statistics]


def _unpack_int8(parts: tuple[Tensor, ...], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    codes, statistics = parts[0].view(torch.int8).reshape(shape), _as_float(parts[1])
    return (codes.float() * (statistics[:, None] / 127.0)).to(dtype)


def _as_float(data: Tensor) -> Tensor:
    """View bytes as float32; they are copied first, because they may not be aligned in memory."""
    return data.clone().view(torch.float32)
