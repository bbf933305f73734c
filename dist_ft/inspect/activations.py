"""Estimated memory of activations: the largest micro-batch, computed forward and backward on fake tensors.

Fake tensors have shapes but no memory, so that a model of any size is computed on any machine, with the rows, the loss,
the method and the recomputation of the run. What is alive is counted by storage, at the moment when it is most.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
import weakref
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..config.run import RunConfig
from ..data.order.loader import split_batches
from ..families import ModelRecipe, architecture_of, build_method, build_task, choose_attention, settle_head
from ..prepare import Prepared
from ..protocols import Task
from ..state import Batch
from .memory import Part

NAME = "activations"


def estimate_activations(config: RunConfig, prepared: Prepared) -> Part:
    """Estimate what forward and backward of a run's largest micro-batch hold besides weights and whole gradients.

    Documents are computed by SDPA; other kernels hold about the same. If a model cannot be computed on fake tensors
    (its computation depends on values, as that of some mixtures does), the part is empty and says why.

    Args:
        config: Configuration of the run.
        prepared: Prepared data of the run.
    """
    cpu = torch.device("cpu")
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, cpu, architecture, "auto")
    task = build_task(config, prepared.facts, attention)
    recipe = ModelRecipe(config, prepared.model_dir, attention, architecture, build_method(config))
    rows = config.train.per_device_train_batch_size
    batch = next(split_batches(prepared.train, task.collate, rank=0, world=1, per_device=rows))
    built = recipe.build_meta(getattr(torch, config.model.dtype))
    settle_head(config, task, built.anatomy.model)
    try:
        with warnings.catch_warnings(), _quiet(logging.getLogger("torch._subclasses.fake_tensor")):
            warnings.simplefilter("ignore")
            count = measure_peak(built.model.train(), task, batch)
    except Exception as error:  # a class may fail in any way on fake tensors
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        return Part(NAME, 0, why=f"not estimated: {reason[:80]}")
    kept = "recomputed" if config.model.gradient_checkpointing else "kept"
    found = f"{len(set(batch.samples)) or rows} longest samples, {batch.tokens:,} tokens"
    return Part(NAME, count, why=f"{found}; {kept} for the backward")


def measure_peak(model: nn.Module, task: Task, batch: Batch) -> int:
    """Return the most bytes that are alive while the loss of a micro-batch and its gradients are computed.

    Weights do not count, and neither do gradients of weights, once they are whole.

    Args:
        model: Model in training mode on the meta device, in the dtype of the forward. It holds fake tensors afterwards.
        task: Task of the run.
        batch: The micro-batch.
    """
    with torch.device("cpu"), torch.enable_grad(), FakeTensorMode(allow_non_fake_inputs=True, shape_env=ShapeEnv()):
        make_fake(model)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.register_post_accumulate_grad_hook(_forget_gradient)
        with Living([*model.parameters(), *model.buffers()]) as living:
            loss = task.loss(model, batch).loss
            loss.backward()
    return living.peak


class Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations return, as long as their storage is alive.

    Attributes:
        now: Bytes that are alive.
        peak: The most that were alive at a time.

    Args:
        known: Tensors whose storage does not count.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in known}
        self._alive: dict[int, int] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._count(tensor.untyped_storage())
        return result

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self._known or key in self._alive:
            return
        self._alive[key] = storage.nbytes()
        self.now += self._alive[key]
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._free, key)

    def _free(self, key: int) -> None:
        self.now -= self._alive.pop(key)


def make_fake(model: nn.Module) -> None:
    """Replace the parameters and buffers of a model by fake tensors of the same shapes; call it in `FakeTensorMode`."""
    parameters: dict[int, nn.Parameter] = {}  # shared ones stay shared
    for module in model.modules():
        for name, parameter in module.named_parameters(recurse=False):
            fake = torch.empty(parameter.shape, dtype=parameter.dtype)
            new = parameters.setdefault(id(parameter), nn.Parameter(fake, requires_grad=parameter.requires_grad))
            module._parameters[name] = new
        for name, buffer in module.named_buffers(recurse=False):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)


@contextlib.contextmanager
def _quiet(logger: logging.Logger) -> Iterator[None]:
    """Leave out what a logger says below `CRITICAL`: torch logs each failure that it raises too."""
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def _forget_gradient(parameter: Tensor) -> None:
    parameter.grad = None
