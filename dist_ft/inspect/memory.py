"""Memory of one rank for weights, gradients and optimizer, by how its engine shards them (Rajbhandari et al. 2020).

Activations are not in it: they depend on micro-batch, lengths and kernels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..config.engine import EngineConfig

MASTER_BYTES = 4  # trained weights and both AdamW moments are float32
MOMENTS_BYTES = 8


@dataclass(frozen=True)
class Sizes:
    """What memory depends on; counts are of parameters unless they are called bytes."""

    frozen_bytes: int
    trained: int
    compute_bytes: int  # of one weight in forward and backward
    largest_block: int


@dataclass(frozen=True)
class Part:
    """Bytes on the device (GPU, or the machine's memory where there is none) and on the host beside a GPU."""

    name: str
    device: int
    host: int = 0
    why: str = ""


def estimate_memory(engine: EngineConfig, world_size: int, sizes: Sizes) -> list[Part]:
    """The parts of one rank's memory."""
    if engine.name == "ddp":
        return [
            Part("frozen weights", sizes.frozen_bytes, why="whole on every rank"),
            Part("trained weights", MASTER_BYTES * sizes.trained, why="float32, whole on every rank"),
            Part("gradients", MASTER_BYTES * sizes.trained, why="float32, whole on every rank"),
            Part("AdamW moments", MOMENTS_BYTES * sizes.trained, why="float32, whole on every rank"),
        ]
    if engine.name == "fsdp":
        return _fsdp(engine.offload == "params", world_size, sizes)
    return _zero(int(engine.name[-1]), engine.offload, world_size, sizes)


def estimate_rows(engine: EngineConfig, rows: int, trained: int, largest: int) -> Part:
    """What a private run holds besides, in which each row of a micro-batch has a gradient.

    Args:
        engine: ddp holds rows' gradients of all weights and their clipped sum, fsdp of one weight at a time.
        rows: of a micro-batch, 0 where they go one by one.
        trained: number of weights that learn.
        largest: and of those in the largest parameter.
    """
    if engine.name == "ddp":
        why = f"float32, {rows} rows and the clipped sum" if rows else "float32, the clipped sum"
        return Part("gradients of rows", MASTER_BYTES * trained * (rows + 1), why=why)
    return Part("gradients of rows", MASTER_BYTES * largest * rows, why="float32, of the largest weight, then let go")


def _fsdp(offloads: bool, world_size: int, sizes: Sizes) -> list[Part]:
    shard = f"a {world_size}th" if world_size > 1 else "whole"

    def part(name: str, count: int, why: str) -> Part:
        own = math.ceil(count / world_size)
        return Part(name, 0, own, why) if offloads else Part(name, own, 0, why)

    return [
        part("frozen weights", sizes.frozen_bytes, shard),
        part("trained weights", MASTER_BYTES * sizes.trained, f"float32, {shard}"),
        part("gradients", MASTER_BYTES * sizes.trained, f"float32, {shard}"),
        part("AdamW moments", MOMENTS_BYTES * sizes.trained, f"float32, {shard}"),
        _gathered(world_size, sizes),
    ]


def _zero(stage: int, offload: str, world_size: int, sizes: Sizes) -> list[Part]:
    shard = f"a {world_size}th" if world_size > 1 else "whole"
    copies = {"weights": world_size if stage == 3 else 1, "gradients": world_size if stage >= 2 else 1}
    weights = math.ceil((sizes.frozen_bytes + sizes.compute_bytes * sizes.trained) / copies["weights"])
    gradients = math.ceil(sizes.compute_bytes * sizes.trained / copies["gradients"])
    optimizer = math.ceil((MASTER_BYTES + MOMENTS_BYTES) * sizes.trained / world_size)
    whole = "whole on every rank"
    to_host = offload in ("optimizer", "params")
    parts = [
        Part("weights", *_placed(weights, offload == "params"), shard if stage == 3 else whole),
        Part("gradients", *_placed(gradients, to_host and stage >= 2), shard if stage >= 2 else whole),
        Part("float32 weights and AdamW moments", *_placed(optimizer, to_host), shard),
    ]
    return [*parts, _gathered(world_size, sizes)] if stage == 3 else parts


def _placed(count: int, on_host: bool) -> tuple[int, int]:
    return (0, count) if on_host else (count, 0)


def _gathered(world_size: int, sizes: Sizes) -> Part:
    """One block in use and the next one on its way."""
    gathered = 2 * sizes.compute_bytes * sizes.largest_block if world_size > 1 else 0
    return Part("gathered blocks", gathered, 0, "one in use and the next")
