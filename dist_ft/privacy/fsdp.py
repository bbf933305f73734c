"""Differentially private training under FSDP2: first the norms of the rows' gradients, then the clipped sum.

A weight is gathered only while its block runs, and its gradient is reduced immediately. A first backward therefore
computes the norms of this rank's rows and discards the gradients. A second backward through the same graph, of the
row losses times their clip factors, computes the sum of clipped gradients, which FSDP2 reduce-scatters (Lee and Kifer
2021, arXiv 2009.03106). Every rank runs the same passes, including ranks with fewer rows or none.
"""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor, distribute_tensor

from ..config.engine import FsdpConfig
from ..engine.fsdp import Fsdp
from ..errors import TrainingError
from ..protocols import LossFn
from ..state import Batch, BuiltModel, LossSum, StepStats
from .hooks import attach_streaming_hooks
from .mechanism import Privacy
from .norms import RowNorms, total_norms
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


class PrivateFsdp(Fsdp):
    """FSDP2 with the mechanism of `privacy`; a row's gradient is that of the mean loss of its targets.

    Norms are computed by Opacus's hooks if, for every parameter, they agree with a separate backward per row. Otherwise
    rows are processed one by one, and the norms are those of autograd's gradients.
    """

    def __init__(self, privacy: Privacy, config: FsdpConfig, **options: Any) -> None:
        super().__init__(config, **{**options, "max_grad_norm": 0.0})  # clips gradients of rows, not their noisy sum
        self.privacy = privacy
        self.norms = RowNorms()
        self.hooks: Any = None
        self.proven = False
        self.rows = 0  # number of rows of the current micro-batch under hooks

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Attach hooks to the unsharded model, then shard it; refuse a model with batch norm."""
        model = built.model
        refuse_batch_norm(model)
        if self.privacy.hooks and not getattr(model, "is_gradient_checkpointing", False):
            try:
                self.hooks = attach_streaming_hooks(model, self.norms.take_samples, self.norms.fail)
            except NotImplementedError as error:
                self._give_up_hooks(model, str(error))
            else:
                self.hooks.disable_hooks()
                repeat_shared_positions(model, lambda: self.rows)
        wrapped = super().wrap(built)
        units: list[tuple[str, Any]] = [(n, m) for n, m in model.named_modules() if isinstance(m, FSDPModule)]
        for name, unit in units:  # runs after FSDP2's own hook, which gathers the unit's weights
            unit.register_forward_pre_hook(partial(self._watch, f"{name}." if name else ""))
        return wrapped

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Accumulate the clipped gradients of rows; `denominator` is unused because the number of rows is private."""
        self._set_training(True)
        micro = micro.to(self.device)
        rows = len(micro.samples)
        most, unproven = self._agree(rows, rows > 1 and not self.proven)
        if self.hooks is not None:
            state = get_chance(self.device)
            found = self._take(micro, loss, proofs=most if unproven else 0)
            if found is not None:
                return found
            set_chance(state, self.device)
        own = list(split_rows(micro))
        idle = [(own[-1] if own else micro).without_targets()] * (most - rows)
        parts = [self._take(row, loss) for row in (*own, *idle)]
        zero = torch.zeros((), device=self.device)
        return LossSum(sum((p.loss for p in parts if p), zero), sum((p.weight for p in parts if p), zero))

    def step(self, learning_rate: float) -> StepStats:
        """Add this rank's shards of the noise, divide by the expected number of rows, and update the weights."""
        step = self.updates + 1
        drawn = self.privacy.stream_noise(step, (parameter.shape for _, parameter in self.trained), self.device)
        for (name, parameter), noise in zip(self.trained, drawn, strict=True):
            shards: Any = parameter.data
            own = distribute_tensor(noise, shards.device_mesh, shards.placements, src_data_rank=None).to_local()
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(shards)
            else:
                assert name in self.norms.names.values(), f"{name} has a gradient that no row's norm counts"
            gradient: Any = parameter.grad
            gradient.to_local().add_(own.to(gradient.to_local().device)).div_(self.privacy.expected_rows)
        self.proven = self.proven and not is_proven_again(step + 1)
        stats = super().step(learning_rate)
        return StepStats(stats.grad_norm, {**stats.metrics, "train/epsilon": self.privacy.epsilon(step)})

    def _take(self, micro: Batch, loss: LossFn, proofs: int = 0) -> LossSum | None:
        """Run the forward and all backwards of a micro-batch.

        Args:
            micro: Any number of rows with hooks, otherwise at most one.
            loss: Loss function of the task.
            proofs: Number of rows, the same on every rank, with a separate backward to verify the hooks.

        Returns:
            The loss; None if the hooks are wrong on any rank, in which case no gradient was added.
        """
        rows, weights = len(micro.samples), row_weights(micro)
        by_hooks = self.hooks is not None and rows > 1
        losses = self._find_losses(micro, loss, by_hooks=by_hooks)
        self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
        squares = self._find_squares(losses, micro, by_hooks=by_hooks, proofs=proofs)
        self.module.set_requires_gradient_sync(True)  # type: ignore[operator]
        if self.hooks is not None and self._agree(self.norms.fault is not None)[0]:
            self._give_up_hooks(self.model, self.norms.fault or "they were wrong for rows of another rank")
            return None
        self.proven = self.proven or (by_hooks and proofs > 0)
        factors = clip_factors(total_norms(squares, rows, self.device), weights, self.privacy.max_grad_norm, self.dtype)
        # FSDP2 averages over ranks, hence times world size.
        (losses * factors[micro.documents]).sum().mul(self.place.world_size).backward()
        return LossSum(losses.detach().sum(), weights.sum())

    def _find_losses(self, micro: Batch, loss: LossFn, *, by_hooks: bool) -> Tensor:
        """Run the forward and return the loss of each target, `[n]`; the document of a target is its row.

        Raises:
            TrainingError: The model cannot be called with hooks. Continuing without them would need all ranks.
        """
        self.norms.fault = None
        if by_hooks:
            self.rows = len(micro.samples)
            self.hooks.enable_hooks()
        try:
            result = loss(self.module, micro)
        except RuntimeError as error:
            if not by_hooks or self.proven or isinstance(error, torch.OutOfMemoryError):
                raise
            rule = f"Opacus's hooks may not support this model: {error}".splitlines()[0]
            raise TrainingError.of("privacy.grad_sample_mode", rule, "set it to loop") from error
        self.rows = 0
        assert result.losses is not None and result.documents is None, "the task must return the loss of each target"
        return result.losses

    def _find_squares(self, losses: Tensor, micro: Batch, *, by_hooks: bool, proofs: int) -> dict[str, Tensor]:
        """Compute the squared norms by a backward that keeps no gradients, and verify them by `proofs` others."""
        rows = len(micro.samples)
        with self.norms.listening(rows, by_hooks=by_hooks):
            losses.sum().backward(retain_graph=True)
        squares = self.norms.squares
        if self.hooks is not None:
            self.hooks.disable_hooks()
        for row in range(proofs):
            with self.norms.listening(1, by_hooks=False):
                losses[micro.documents == row].sum().backward(retain_graph=True)
            if by_hooks and row < rows and self.norms.fault is None:
                self.norms.compare(squares, row, TOLERANCE[self.dtype])
        return squares

    def _agree(self, *values: int) -> list[int]:
        """Return the maximum of each value over all ranks, so that all ranks run the same collectives."""
        greatest = torch.tensor(values)
        if self.place.world_size > 1:
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        found: list[int] = greatest.tolist()
        return found

    def _watch(self, prefix: str, unit: nn.Module, inputs: Any) -> None:
        """Watch the gathered parameters of a unit; FSDP2 keeps these tensor objects for the whole run."""
        for name, parameter in unit.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self.norms.watch(prefix + name, parameter)

    def _give_up_hooks(self, model: nn.Module, reason: str) -> None:
        if self.hooks is not None:
            remove_hooks(model, self.hooks)
            self.hooks = None
        warnings.warn(f"gradients of rows are computed one by one, which is slower: {reason}", stacklevel=2)
