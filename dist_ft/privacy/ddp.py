"""Differentially private training under DDP: clip each row's gradient, sum them, and add noise once per step.

The result does not depend on which rank and micro-batch a row is in: clipped gradients are summed over the whole step,
and every rank draws the same noise from (seed, step).
"""

from __future__ import annotations

import math
import warnings
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..engine.ddp import Ddp
from ..process import comm
from ..protocols import LossFn, OptimFactory
from ..state import Batch, BuiltModel, LossSum, StepStats
from .hooks import attach_hooks
from .mechanism import Privacy
from .rows import (
    TOLERANCE,
    clip_factors,
    get_chance,
    is_proven_again,
    refuse_batch_norm,
    remove_hooks,
    repeat_shared_positions,
    row_weights,
    set_chance,
    split_rows,
)


class Private(Ddp):
    """DDP with the mechanism of `privacy`; a row's gradient is that of the mean loss of its targets.

    Gradients of rows are computed by Opacus's hooks if, for every parameter, they agree with a separate backward per
    row. Otherwise (relative positions, gradient checkpointing) rows are processed one by one.
    """

    averages_in_backward = False

    def __init__(self, privacy: Privacy, **options: Any) -> None:
        super().__init__(**{**options, "max_grad_norm": 0.0})  # gradients of rows are clipped, not their noisy sum
        self.privacy = privacy
        self.hooks: Any = None
        self.proven = False
        self.rows = 0  # number of rows of the current micro-batch under hooks

    def setup(self, built: BuiltModel, build_optim: OptimFactory) -> None:
        """Set up as `Ddp` does; refuse a model with batch norm, and attach the hooks."""
        super().setup(built, build_optim)
        refuse_batch_norm(self.model)
        self.sums = [torch.zeros_like(parameter, dtype=torch.float32) for _, parameter in self.trained]
        if self.privacy.hooks and not getattr(self.model, "is_gradient_checkpointing", False):
            try:
                self.hooks = attach_hooks(self.model)
            except NotImplementedError as error:
                self._give_up_hooks(str(error))
            else:
                repeat_shared_positions(self.model, lambda: self.rows)

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Move the model to the device and broadcast rank 0's weights; gradients are reduced in `step`."""
        model = built.model.to(self.device)
        if self.place.world_size > 1:
            self.send_weights(model)
        return model

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Accumulate the clipped gradients of rows; `denominator` is unused because the number of rows is private."""
        self._set_training(True)
        if not micro.samples:
            return LossSum(torch.zeros(()), torch.zeros(()))
        micro = micro.to(self.device)
        if self.hooks is not None and len(micro.samples) > 1:
            found = self._take_together(micro, loss)
            if found is not None:
                return found
        return self._take_one_by_one(micro, loss)

    def step(self, learning_rate: float) -> StepStats:
        """Sum over ranks, add noise, divide by the expected number of rows, and update the weights."""
        step = self.updates + 1
        noise = self.privacy.stream_noise(step, (total.shape for total in self.sums), self.device)
        for (_, parameter), total, drawn in zip(self.trained, self.sums, noise, strict=True):
            parameter.grad = (comm.total(total) + drawn).div_(self.privacy.expected_rows)
            total.zero_()
        self.proven = self.proven and not is_proven_again(step + 1)
        stats = super().step(learning_rate)
        return replace(stats, metrics={"train/epsilon": self.privacy.epsilon(step)})

    def _take_one_by_one(self, micro: Batch, loss: LossFn) -> LossSum:
        """Run a separate forward and backward for each row."""
        parameters = [parameter for _, parameter in self.trained]
        parts = []
        if self.hooks is not None:
            self.hooks.disable_hooks()
        for row, weight in zip(split_rows(micro), row_weights(micro), strict=True):
            result = loss(self.module, row)
            result.loss.backward()
            gradients = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
            norm = torch.stack([g.double().square().sum() for _, g in gradients]).sum().sqrt()
            factor = clip_factors(norm[None], weight[None], self.privacy.max_grad_norm, self.dtype)
            for i, gradient in gradients:
                self.sums[i].add_(gradient.float() * factor)
            self.model.zero_grad(set_to_none=True)
            parts.append(result.loss.detach())
        if self.hooks is not None:
            self.hooks.enable_hooks()
        return LossSum(torch.stack(parts).sum(), row_weights(micro).sum())

    def _take_together(self, micro: Batch, loss: LossFn) -> LossSum | None:
        """Compute the gradients of all rows in one backward with Opacus's hooks; return None if they are wrong."""
        state = get_chance(self.device)
        self.rows = len(micro.samples)
        try:
            result = loss(self.module, micro)
            assert result.losses is not None and result.documents is None, (
                "the task must return the loss of each target"
            )
            result.losses.sum().backward(retain_graph=not self.proven)
            fault = self._find_fault(result.losses, micro.documents)
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # the hooks may fail in any way; an error of the model itself recurs row by row
            if self.proven:
                raise
            fault = f"{type(error).__name__}: {error}".splitlines()[0]
        if fault is None:
            self._add_clipped(row_weights(micro))
        self._forget()
        if fault is None:
            self.proven = True
            return LossSum(result.loss.detach(), result.weight)
        self._give_up_hooks(fault)
        set_chance(state, self.device)
        return None

    def _add_clipped(self, weights: Tensor) -> None:
        taken = [(i, p.grad_sample) for i, (_, p) in enumerate(self.trained) if p.grad_sample is not None]  # type: ignore[attr-defined]
        squares = torch.stack([gradient.float().flatten(1).square().sum(dim=1) for _, gradient in taken])
        factors = clip_factors(squares.double().sum(dim=0).sqrt(), weights, self.privacy.max_grad_norm, self.dtype)
        for i, gradient in taken:
            self.sums[i].add_(torch.tensordot(factors, gradient.float(), dims=1))

    def _find_fault(self, losses: Tensor, documents: Tensor) -> str | None:
        """Return why the hooks' gradients are wrong, or None; compare with autograd unless already proven."""
        for name, parameter in self.trained:
            gradients: Any = parameter.grad_sample  # type: ignore[attr-defined]
            if gradients is None and parameter.grad is None:
                continue
            if not isinstance(gradients, Tensor) or gradients.shape != (self.rows, *parameter.shape):
                return f"{name} is not used exactly once per row"
        if self.proven:
            return None
        self.hooks.disable_hooks()
        faults = (self._find_fault_of_row(losses[documents == row].sum(), row) for row in range(self.rows))
        fault = next((found for found in faults if found), None)
        self.hooks.enable_hooks()
        return fault

    def _find_fault_of_row(self, loss: Tensor, row: int) -> str | None:
        """Compare the hooks' gradients of one row with a separate backward."""
        parameters = [parameter for _, parameter in self.trained]
        true = torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True)
        total = math.sqrt(sum(float(g.float().square().sum()) for g in true if g is not None))
        for (name, parameter), gradient in zip(self.trained, true, strict=True):
            found: Any = parameter.grad_sample  # type: ignore[attr-defined]
            if found is None:
                continue
            norm = 0.0 if gradient is None else float(gradient.float().norm())
            miss = float((found[row] if gradient is None else found[row].float() - gradient.float()).norm())
            if not miss <= TOLERANCE[self.dtype] * (norm + 1e-3 * total):
                return f"the gradient of {name} for a row differs from that of a separate backward"
        return None

    def _give_up_hooks(self, reason: str) -> None:
        if self.hooks is not None:
            remove_hooks(self.model, self.hooks)
            self.hooks = None
        warnings.warn(f"gradients of rows are computed one by one, which is slower: {reason}", stacklevel=2)

    def _forget(self) -> None:
        """Clear the gradients of a backward, including one that failed."""
        self.rows = 0
        self.model.zero_grad(set_to_none=True)
        for _, parameter in self.trained:
            parameter.grad_sample = None  # type: ignore[attr-defined]
