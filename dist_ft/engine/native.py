"""What DDP and FSDP2 share: PyTorch's own autograd, AdamW and clipping."""

from __future__ import annotations

import contextlib
from abc import ABC, abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..process.place import Place
from ..protocols import LossFn, OptimFactory
from ..state import Batch, BuiltModel, LossSum, NamedState, StepStats


class NativeEngine(ABC):
    """An engine over torch modules; subclasses wrap the model and say how its weights reach every rank.

    Args:
        device: where this rank computes.
        place: this rank.
        dtype: forward and backward; trained weights and moments are float32.
        max_grad_norm: clip the global gradient norm to this; 0 does not clip.
    """

    module: nn.Module  # what is called: forward runs the wrapper's hooks
    model: nn.Module  # what has the parameters' engine-neutral names

    def __init__(self, *, device: torch.device, place: Place, dtype: torch.dtype, max_grad_norm: float) -> None:
        self.device = device
        self.place = place
        self.dtype = dtype
        self.max_grad_norm = max_grad_norm

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None:
        """Distribute rank 0's weights over the ranks, and build the optimizer over the trained parameters."""
        self.model = built.model
        self.module = self.wrap(built)
        self.module.train()
        self.trained = [(name, p) for name, p in self.model.named_parameters() if p.requires_grad]
        self.optimizer = build_optim(self.trained)

    @abstractmethod
    def wrap(self, built: BuiltModel) -> nn.Module:
        """Distribute the model, whose weights are rank 0's afterwards, and return the module to call."""

    def accumulating(self, *, last: bool) -> contextlib.AbstractContextManager[Any]:
        """Around a micro-batch; before the last one gradients need not be reduced."""
        return contextlib.nullcontext()

    def precision(self) -> contextlib.AbstractContextManager[Any]:
        """Around a forward."""
        return contextlib.nullcontext()

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Add the gradient of `loss / denominator`; the wrapper averages over ranks, hence times world size."""
        self._set_training(True)
        with self.accumulating(last=last):
            with self.precision():
                result = loss(self.module, micro.to(self.device))
            (result.loss * (self.place.world_size / denominator)).backward()
        return LossSum(result.loss.detach(), result.weight, result.counts)

    def step(self, learning_rate: float) -> StepStats:
        """Clip by the global norm, update, clear."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate * group.get("lr_scale", 1.0)
        parameters = [p for _, p in self.trained]
        norm = nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None])
        if isinstance(norm, DTensor):
            norm = norm.full_tensor()
        if self.max_grad_norm > 0:
            nn.utils.clip_grads_with_norm_(parameters, self.max_grad_norm, norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return StepStats(grad_norm=float(norm))

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum:
        """The loss without dropout and without gradients."""
        self._set_training(False)
        with self.precision():
            return loss(self.module, micro.to(self.device))

    def state(self) -> NamedState:
        """Trained weights and AdamW's moments; loading writes into these very tensors."""
        tensors: dict[str, Any] = {}
        for name, parameter in self.trained:
            tensors[f"model/{name}"] = parameter.data
            moments = self.optimizer.state[parameter]
            if not moments:  # before the first step AdamW has none
                moments["step"] = torch.tensor(0.0)
                moments["exp_avg"] = torch.zeros_like(parameter.data)
                moments["exp_avg_sq"] = torch.zeros_like(parameter.data)
            tensors[f"exp_avg/{name}"] = moments["exp_avg"]
            tensors[f"exp_avg_sq/{name}"] = moments["exp_avg_sq"]
        return NamedState(tensors, updates=self._updates())

    def load(self, state: NamedState) -> None:
        """Take over a state that `state()` gave and a checkpoint has filled."""
        for _, parameter in self.trained:
            self.optimizer.state[parameter]["step"].fill_(float(state.updates))

    def weights(self, *, trainable: bool) -> Iterator[tuple[str, Tensor]]:
        """Full tensors by name, one at a time; with `trainable`, only those that learn. Every rank must iterate."""
        for name, parameter in self.model.named_parameters():
            if parameter.requires_grad or not trainable:
                yield name, _full(parameter.data)

    def _updates(self) -> int:
        moments = self.optimizer.state[self.trained[0][1]]
        return int(moments["step"]) if moments else 0

    def _set_training(self, mode: bool) -> None:
        if self.module.training != mode:
            self.module.train(mode)


def _full(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
