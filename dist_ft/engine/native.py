"""Common base of DDP and FSDP2: gradients, AdamW and clipping by PyTorch itself."""

from __future__ import annotations

import contextlib
import math
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..process.place import Place
from ..protocols import LossFn, OptimFactory
from ..state import Batch, Beat, BuiltModel, LossSum, NamedState, StepStats, unwatched


class NativeEngine(ABC):
    """Engine over torch modules; subclasses wrap the model and distribute its weights.

    Args:
        device: Device of this rank.
        place: Place of this rank.
        dtype: Dtype of forward and backward; masters, gradients and moments are float32.
        max_grad_norm: Maximum global gradient norm; 0 disables clipping.
        tick: Called for each tensor that is sent.
    """

    module: nn.Module  # the wrapped model, which is called
    model: nn.Module  # the model itself, whose parameter names do not depend on the engine
    trained: list[tuple[str, nn.Parameter]]  # trainable parameters of the model
    masters: list[tuple[str, nn.Parameter]]  # parameters that the optimizer updates: `trained` or float32 copies

    def __init__(
        self,
        *,
        device: torch.device,
        place: Place,
        dtype: torch.dtype,
        max_grad_norm: float,
        tick: Beat = unwatched,
    ) -> None:
        self.device = device
        self.place = place
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm
        self.tick = tick

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None:
        """Distribute rank 0's weights and build the optimizer over the trained parameters."""
        self.model = built.model
        self.module = self.wrap(built)
        self.module.train()
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.masters = self.make_masters()
        self.optimizer = build_optim(self.masters)
        self.updates = 0

    @abstractmethod
    def wrap(self, built: BuiltModel) -> nn.Module:
        """Distribute the model with the weights of rank 0 and return the module to call."""

    def make_masters(self) -> list[tuple[str, nn.Parameter]]:
        """Return the parameters that the optimizer updates, in the order of `trained`; by default `trained` itself."""
        return self.trained

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Return a context for a micro-batch; gradients need to be reduced only in the last one."""
        return contextlib.nullcontext()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Accumulate the gradients of a micro-batch."""
        loss.backward()

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Accumulate the gradient of `loss / denominator`, times the world size because gradients are averaged."""
        self._set_training(True)
        with self.accumulating(last=last):
            result = loss(self.module, micro.to(self.device))
            self.backward(result.loss * (self.place.world_size / denominator), last=last)
        return LossSum(result.loss.detach(), result.weight, result.counts)

    def step(self, learning_rate: float) -> StepStats:
        """Clip by the global norm, update the weights unless the norm is not finite, and clear the gradients."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        parameters = [p for _, p in self.masters]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        found = float(norm)
        if math.isfinite(found):
            if self.max_grad_norm > 0:
                nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
            self.optimizer.step()
            self.updates += 1
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(grad_norm=found)

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum:
        """Compute the loss of a micro-batch in evaluation mode, without gradients."""
        self._set_training(False)
        return loss(self.module, micro.to(self.device))

    def state(self) -> NamedState:
        """Return masters and AdamW's moments by name; loading a checkpoint fills these tensors in place."""
        tensors: dict[str, Any] = {}
        for name, master in self.masters:
            if not self.optimizer.state[master]:  # AdamW has no state before its first update
                self.optimizer.state[master] = zero_moments(master, self.optimizer)
            tensors[f"model/{name}"] = master.data
            for moment in ("exp_avg", "exp_avg_sq"):
                tensors[f"{moment}/{name}"] = self.optimizer.state[master][moment]
        return NamedState(tensors, updates=self.updates)

    def load(self, state: NamedState) -> None:
        """Apply a state that was returned by `state()` and filled from a checkpoint."""
        for _, master in self.masters:
            self.optimizer.state[master]["step"].fill_(float(state.updates))
        self.updates = state.updates

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Yield full tensors by name, one at a time; with `trainable`, only trained ones. Every rank must iterate."""
        masters = dict(self.masters)
        for name, parameter in self.model.named_parameters():
            if name in masters or not trainable:
                yield name, _full(masters.get(name, parameter).data)

    def _set_training(self, mode: bool) -> None:
        if self.module.training != mode:
            self.module.train(mode)


def zero_moments(parameter: Tensor, optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return the state of a parameter in AdamW before its first update.

    A fused AdamW needs the update count on the device of the parameter; otherwise it is on the CPU.
    """
    device = parameter.device if optimizer.defaults["fused"] else torch.device("cpu")
    return {
        "step": torch.zeros((), dtype=torch.float32, device=device),
        "exp_avg": torch.zeros_like(parameter.data),
        "exp_avg_sq": torch.zeros_like(parameter.data),
    }


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
