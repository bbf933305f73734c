"""Distributed data parallel: every rank holds everything, gradients are summed."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from ..state import BuiltModel
from .native import NativeEngine


class Ddp(NativeEngine):
    """`torch.nn.parallel.DistributedDataParallel`; alone, the model itself."""

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Move the model to the device; DDP sends every rank the weights of rank 0."""
        model = built.model.to(self.device)
        if self.place.world_size == 1:
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Reduce once a step."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Trained weights are float32 here; autocast takes their bfloat16 form for each use."""
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)
