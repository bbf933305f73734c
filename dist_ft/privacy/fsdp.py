"""Differentially private training under FSDP2: norms of rows' gradients first, then the sum of the clipped ones.

Weights are whole only while their block runs, and gradients are reduced as soon as they are there. So one backward,
whose gradients are let go at once, finds the norms of this rank's rows; a second one through the same graph, of the
rows' losses each times its factor, gives the sum of clipped gradients, which FSDP2 adds up into shards (Lee and Kifer
2021, arXiv 2009.03106). Every rank runs the same passes, also one that has fewer rows or none.
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
    """Fsdp whose step is the mechanism of `privacy`; a row's gradient is that of the mean loss of its targets.

    Norms come from Opacus's hooks, once these have proved right for the model: parameter by parameter, what a backward
    of each row alone gives. Else rows go one by one, and autograd itself gives their norms.
    """

    def __init__(self, privacy: Privacy, config: FsdpConfig, **options: Any) -> None:
        super().__init__(config, **{**options, "max_grad_norm": 0.0})  # rows are clipped, and their noisy sum is not
        self.privacy = privacy
        self.norms = RowNorms()
        self.hooks: Any = None
        self.proven = False
        self.rows = 0  # that the model sees now under hooks

    def wrap(self, built: BuiltModel) -> nn.Module:
        """Attach hooks where the model is still whole, then shard; refuse a model that mixes rows."""
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
        for name, unit in units:  # behind FSDP2's own hook, which gathers the unit's weights
            unit.register_forward_pre_hook(partial(self._watch, f"{name}." if name else ""))
        return wrapped

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Add the rows' clipped gradients; `denominator` is not read, as the number of rows is itself private."""
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
        """Add this rank's shards of the noise, divide by the expected number of rows, update."""
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
        """All backwards of a micro-batch; None where hooks are not sound on some rank, and nothing was added.

        Args:
            micro: any number of rows under hooks, else one or none.
            loss: the task's.
            proofs: how many rows, on every rank, get a backward of their own to prove hooks with.
        """
        rows, weights = len(micro.samples), row_weights(micro)
        by_hooks = self.hooks is not None and rows > 1
        losses = self._find_losses(micro, loss, by_hooks=by_hooks)
        self.module.set_requires_gradient_sync(False)  # type: ignore[operator]
        squares = self._find_squares(losses, micro, by_hooks=by_hooks, proofs=proofs)
        self.module.set_requires_gradient_sync(True)  # type: ignore[operator]
        if self.hooks is not None and self._agree(self.norms.fault is not None)[0]:
            self._give_up_hooks(self.model, self.norms.fault or "they were not right for rows of another rank")
            return None
        self.proven = self.proven or (by_hooks and proofs > 0)
        factors = clip_factors(total_norms(squares, rows, self.device), weights, self.privacy.max_grad_norm, self.dtype)
        # FSDP2 averages over ranks, hence times world size.
        (losses * factors[micro.documents]).sum().mul(self.place.world_size).backward()
        return LossSum(losses.detach().sum(), weights.sum())

    def _find_losses(self, micro: Batch, loss: LossFn, *, by_hooks: bool) -> Tensor:
        """The forward: [n] the loss of each target, whose document is its row.

        Raises:
            TrainingError: the model cannot be called under hooks. To go on without them would need every rank.
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
            rule = f"Opacus's hooks may not go with this model: {error}".splitlines()[0]
            raise TrainingError.of("privacy.grad_sample_mode", rule, "set it to loop") from error
        self.rows = 0
        assert result.losses is not None and result.documents is None, "the task tells no loss of each row's targets"
        return result.losses

    def _find_squares(self, losses: Tensor, micro: Batch, *, by_hooks: bool, proofs: int) -> dict[str, Tensor]:
        """A backward that leaves no gradients but tells rows' norms, and those that prove them."""
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
        """The greatest of each value over all ranks: ranks that went different ways would wait for each other."""
        greatest = torch.tensor(values)
        if self.place.world_size > 1:
            dist.all_reduce(greatest, op=dist.ReduceOp.MAX)
        found: list[int] = greatest.tolist()
        return found

    def _watch(self, prefix: str, unit: nn.Module, inputs: Any) -> None:
        """The unit's weights are whole now, as tensors that stay the same from here on."""
        for name, parameter in unit.named_parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor):
                self.norms.watch(prefix + name, parameter)

    def _give_up_hooks(self, model: nn.Module, reason: str) -> None:
        if self.hooks is not None:
            remove_hooks(model, self.hooks)
            self.hooks = None
        warnings.warn(f"gradients of rows are taken one by one, which is slower: {reason}", stacklevel=2)
