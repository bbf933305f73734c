"""Distributed data parallel: every rank holds the whole model, and gradients are averaged."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from ..model.reach import leaves_of
from ..process import comm
from ..state import BuiltModel, NamedState, StepStats
from .native import NativeEngine
from .reduction import GradientAverage

NAMED = 5  # parameters that a message lists


class Ddp(NativeEngine):
    """Engine in which every rank holds the whole model and ranks average their gradients.

    In float32, the model is wrapped in `torch.nn.parallel.DistributedDataParallel`, or used as it is on a single rank.
    In bfloat16, trained parameters are bfloat16 copies of float32 masters, as under the other engines. Gradients are
    accumulated and averaged in float32.
    """

    average: GradientAverage | None = None  # used instead of DistributedDataParallel if set
    looked = False  # whether parameters without a gradient have been searched for

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Move the model to the device and broadcast the weights of rank 0."""
        model = built.model.to(self.device)
        if self.place.world_size == 1:
            return model
        if self.dtype != torch.float32:
            self.send_weights(model)
            return model
        return DistributedDataParallel(
            model,
            device_ids=[self.device] if self.device.type == "cuda" else None,
            broadcast_buffers=False,
            gradient_as_bucket_view=True,
        )

    def send_weights(self, model: nn.Module) -> None:
        """Broadcast all parameters from rank 0, one at a time. Collective."""
        for name, parameter in model.named_parameters():
            dist.broadcast(parameter.data, src=0)
            self.tick(f"sending {name}")

    def make_masters(self) -> list[tuple[str, nn.Parameter]]:
        """Keep the float32 weights as masters and replace them in the model by copies in `dtype`."""
        if self.dtype == torch.float32:
            return self.trained
        masters = [(name, nn.Parameter(parameter.data)) for name, parameter in self.trained]
        for _, parameter in self.trained:
            parameter.data = parameter.data.to(self.dtype)
            parameter.grad_dtype = torch.float32  # autograd accumulates gradients over micro-batches in this dtype
        if self.averages_in_backward and self.place.world_size > 1:
            self.average = GradientAverage([parameter for _, parameter in self.trained], self.place.world_size)
        return masters

    averages_in_backward = True  # False in private engines, which sum over ranks in `step`

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context that disables gradient reduction unless this is the last micro-batch of the step."""
        if last or not isinstance(self.module, DistributedDataParallel):
            return contextlib.nullcontext()
        return self.module.no_sync()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch; after the last one, average them over ranks."""
        if not self.looked:
            self._look_for_unused(loss)
        with self.average.averaging() if last and self.average is not None else contextlib.nullcontext():
            loss.backward()

    def step(self, learning_rate: float) -> StepStats:
        """Clip by the global norm, update the masters, copy them into the model, and clear the gradients."""
        if self.masters is not self.trained:
            for (_, parameter), (_, master) in zip(self.trained, self.masters, strict=True):
                if parameter.grad is not None:
                    master.grad, parameter.grad = parameter.grad, None
        stats = super().step(learning_rate)
        self._renew_copies()
        return stats

    def load(self, state: NamedState) -> None:
        """Apply a state that was returned by `state()` and filled from a checkpoint."""
        super().load(state)
        self._renew_copies()

    @torch.no_grad()
    def _renew_copies(self) -> None:
        if self.masters is not self.trained:
            torch._foreach_copy_([p for _, p in self.trained], [master for _, master in self.masters])

    def _look_for_unused(self, loss: Tensor) -> None:
        """Find the parameters that the first micro-batch does not use, and warn about those unused on all ranks.

        They are not updated, as in a plain PyTorch loop. DistributedDataParallel would wait forever for their
        gradients, so it is replaced by `GradientAverage`. Collective.
        """
        self.looked = True
        leaves = leaves_of(loss)
        used = comm.total(torch.tensor([float(id(p) in leaves) for _, p in self.trained], device=self.device)).tolist()
        unused = [name for (name, _), ranks in zip(self.trained, used, strict=True) if ranks == 0]
        if unused and self.place.is_main:
            names = ", ".join(unused[:NAMED]) + (", ..." if len(unused) > NAMED else "")
            warnings.warn(
                f"{len(unused)} of {len(used)} trained parameters are not used by the first batch and are not updated "
                f"unless a later one uses them: {names}",
                stacklevel=2,
            )
        if isinstance(self.module, DistributedDataParallel) and min(used) < self.place.world_size:
            self.module._remove_autograd_hooks()
            self.module = self.model
            self.average = GradientAverage([parameter for _, parameter in self.trained], self.place.world_size)
