"""Estimated memory per rank for weights, gradients and optimizer states under each engine (Rajbhandari et al. 2020).

Activations are estimated in activations.py.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.engine import EngineConfig, FsdpConfig

MASTER_BYTES = 4  # trainable weights and both AdamW moments are float32
MOMENTS_BYTES = 8


@dataclass(frozen=True)
class Sizes:
    """Sizes of a model that determine its memory."""

    frozen_bytes: int  # bytes of all frozen weights
    trained: int  # number of trainable parameters
    compute_bytes: int  # bytes of one parameter in forward and backward
    largest_block: int  # number of parameters of the largest block
    blocks: int  # number of parameters of all blocks
    outside: int  # number of parameters that text reaches outside the blocks: embeddings, final norm, head


@dataclass(frozen=True)
class Part:
    """One part of the memory of a rank, in bytes on the device (main memory without a GPU) and on the host."""

    name: str
    device: int
    host: int = 0
    why: str = ""


def estimate_memory(engine: EngineConfig, world_size: int, sizes: Sizes, *, async_save: bool = False) -> list[Part]:
    """Estimate the parts of one rank's memory; with `async_save`, also the copy that checkpoints are written from."""
    if engine.name == "ddp":
        parts = _ddp(sizes)
    elif engine.name == "fsdp":
        parts = _fsdp(engine, world_size, sizes)
    else:
        parts = _zero(int(engine.name[-1]), engine.offload, world_size, sizes)
    return [*parts, _copy(world_size, sizes)] if async_save else parts


def _copy(world_size: int, sizes: Sizes) -> Part:
    """Return the memory of the copy that a checkpoint is written from: ranks also share what is replicated."""
    count = math.ceil((MASTER_BYTES + MOMENTS_BYTES) * sizes.trained / world_size)
    share = f", 1/{world_size} per rank" if world_size > 1 else ""
    return Part("copy for checkpoints", 0, count, f"trainable weights and AdamW moments{share}; train.async_save")


def estimate_rows(engine: EngineConfig, rows: int, trained: int, largest: int) -> Part:
    """Estimate the memory of the per-sample gradients of a differentially private run.

    Args:
        engine: ddp stores the per-sample gradients of all parameters and their clipped sum, fsdp those of one
            parameter at a time.
        rows: number of rows per micro-batch; 0 if rows are processed one by one.
        trained: number of trainable parameters.
        largest: number of elements of the largest trainable parameter.
    """
    if engine.name == "ddp":
        why = f"float32, {rows} rows and the clipped sum" if rows else "float32, the clipped sum"
        return Part("per-sample gradients", MASTER_BYTES * trained * (rows + 1), why=why)
    return Part("per-sample gradients", MASTER_BYTES * largest * rows, why="float32, of one parameter at a time")


def _ddp(sizes: Sizes) -> list[Part]:
    parts = [
        Part("frozen weights", sizes.frozen_bytes, why="replicated"),
        Part("trainable weights", MASTER_BYTES * sizes.trained, why="float32, replicated"),
        Part("gradients", MASTER_BYTES * sizes.trained, why="float32, replicated"),
        Part("AdamW moments", MOMENTS_BYTES * sizes.trained, why="float32, replicated"),
    ]
    if sizes.compute_bytes == MASTER_BYTES:
        return parts
    return [*parts, Part("copies of trainable weights", sizes.compute_bytes * sizes.trained, why="of the forward")]


def _fsdp(engine: FsdpConfig, world_size: int, sizes: Sizes) -> list[Part]:
    offloads = engine.offload == "params"
    shard = f"1/{world_size} per rank" if world_size > 1 else "unsharded"

    def part(name: str, count: int, why: str) -> Part:
        own = math.ceil(count / world_size)
        return Part(name, 0, own, why) if offloads else Part(name, own, 0, why)

    return [
        part("frozen weights", sizes.frozen_bytes, shard),
        part("trainable weights", MASTER_BYTES * sizes.trained, f"float32, {shard}"),
        part("gradients", MASTER_BYTES * sizes.trained, f"float32, {shard}"),
        part("AdamW moments", MOMENTS_BYTES * sizes.trained, f"float32, {shard}"),
        *_gathered_by_fsdp(engine, world_size, sizes),
    ]


def _gathered_by_fsdp(engine: FsdpConfig, world_size: int, sizes: Sizes) -> list[Part]:
    """Return the memory of whole weights in forward and backward, and of whole gradients."""
    if world_size == 1:
        return []
    blocks = min(2 * sizes.largest_block, sizes.blocks) if engine.reshard_after_forward else sizes.blocks
    which = "the current and the prefetched block" if engine.reshard_after_forward else "all blocks"
    parts = [
        Part("gathered blocks", sizes.compute_bytes * blocks, why=which),
        Part("gathered outside blocks", sizes.compute_bytes * sizes.outside, why="embeddings, final norm, head"),
    ]
    if engine.gradient_reduction == "step":
        parts.append(Part("whole gradients", MASTER_BYTES * sizes.trained, why="float32, until the end of the step"))
    return parts


def _zero(stage: int, offload: str, world_size: int, sizes: Sizes) -> list[Part]:
    shard = f"1/{world_size} per rank" if world_size > 1 else "unsharded"
    copies = {"weights": world_size if stage == 3 else 1, "gradients": world_size if stage >= 2 else 1}
    weights = math.ceil((sizes.frozen_bytes + sizes.compute_bytes * sizes.trained) / copies["weights"])
    gradients = math.ceil(MASTER_BYTES * sizes.trained / copies["gradients"])
    optimizer = math.ceil((MASTER_BYTES + MOMENTS_BYTES) * sizes.trained / world_size)
    whole = "replicated"
    to_host = offload in ("optimizer", "params")
    parts = [
        Part("weights", *_placed(weights, offload == "params"), shard if stage == 3 else whole),
        Part("gradients", *_placed(gradients, to_host and stage >= 2), f"float32, {shard if stage >= 2 else whole}"),
        Part("float32 weights and AdamW moments", *_placed(optimizer, to_host), shard),
    ]
    return [*parts, _gathered(world_size, sizes)] if stage == 3 else parts


def _placed(count: int, on_host: bool) -> tuple[int, int]:
    return (0, count) if on_host else (count, 0)


def _gathered(world_size: int, sizes: Sizes) -> Part:
    """Return the memory of the parameters that ZeRO-3 gathers: of the current and the prefetched block."""
    gathered = 2 * sizes.compute_bytes * sizes.largest_block if world_size > 1 else 0
    return Part("gathered blocks", gathered, 0, "the current and the prefetched block")
