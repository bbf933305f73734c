"""FSDP2: parameters, gradients and optimizer state sharded block by block (torch.distributed.fsdp.fully_shard)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    OffloadPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config.engine import FsdpConfig
from ..process.comm import barrier
from ..state import BuiltModel, NamedState
from .native import NativeEngine


class Fsdp(NativeEngine):
    """Engine that shards with FSDP2: each block is one communication unit, and the rest of the model another."""

    def __init__(self, config: FsdpConfig, **options: Any) -> None:
        super().__init__(**options)
        self.config = config

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Shard the model, then scatter rank 0's weights to all ranks, one tensor at a time."""
        model, anatomy = built
        mesh = init_device_mesh(self.device.type, (self.place.world_size,))
        half = self.dtype != torch.float32
        options: dict[str, Any] = {
            "mesh": mesh,
            "mp_policy": MixedPrecisionPolicy(self.dtype, torch.float32) if half else MixedPrecisionPolicy(),
            "offload_policy": self._offload(),
            "reshard_after_forward": self.config.reshard_after_forward,
        }
        source = {name: p.detach() for name, p in model.named_parameters()} if self.place.is_main else {}
        modules = dict(anatomy.model.named_modules())
        # Parts that text does not reach are separate units; otherwise they would be gathered with the root unit.
        for part in (*(modules[name] for name in anatomy.idle if name in modules), *anatomy.parts(anatomy.blocks)):
            fully_shard(part, **options)
        # The root unit (embeddings, head) is needed from the start of the forward to the end of the backward.
        fully_shard(model, **options | {"reshard_after_forward": False})
        if hasattr(model, "generate"):  # calls an encoder directly, whose embeddings are in the root unit
            register_fsdp_forward_method(model, "generate")
        for name, parameter in model.named_parameters():
            _scatter(parameter, source.pop(name, None))
            self.tick(f"sharding {name}")
        for buffer in model.buffers():
            buffer.data = buffer.data.to(self.device)
        barrier()
        return model

    @contextlib.contextmanager
    def accumulating(self, *, last: bool) -> Iterator[None]:
        """Reduce-scatter gradients after each micro-batch or only after the last one (`engine.gradient_reduction`)."""
        reduces = last or self.config.gradient_reduction == "micro_batch"
        self.model.set_requires_gradient_sync(reduces)  # type: ignore[operator]
        yield

    def load(self, state: NamedState) -> None:
        """Apply a state that was returned by `state()` and filled from a checkpoint."""
        super().load(state)
        self._forget_gathered()

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors by name, one at a time; with `trainable`, only trained ones. Every rank must iterate."""
        self._forget_gathered()
        yield from super().weights(trainable=trainable)

    def _forget_gathered(self) -> None:
        """Free weights that an evaluation gathered in the dtype of the forward; only a backward would free them."""
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()

    def _offload(self) -> OffloadPolicy:
        if self.config.offload == "none" or self.device.type == "cpu":  # shards are already in CPU memory
            return OffloadPolicy()
        return CPUOffloadPolicy()


def _scatter(parameter: nn.Parameter, full: Tensor | None) -> None:
    """Fill a sharded parameter with rank 0's full tensor."""
    shards = parameter.data
    assert isinstance(shards, DTensor)
    device = shards.device_mesh.device_type
    source = torch.empty(shards.shape, dtype=shards.dtype, device=device) if full is None else full.to(device)
    filled = distribute_tensor(source, shards.device_mesh, shards.placements, src_data_rank=0)
    shards.to_local().copy_(filled.to_local())
