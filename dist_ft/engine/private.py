"""Differentially private training under data parallelism: clip each row's gradient, add up, add noise once.

Which rank has a row, and in which micro-batch, changes nothing: clipped gradients of rows are summed over the whole
step, and the noise is drawn alike on every rank from (seed, step).
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from .. import comm
from ..errors import RequestError
from ..privacy import Privacy, attach_hooks
from ..state import Batch, LossFn, LossSum, ModelFactory, OptimFactory, StepStats
from .ddp import Ddp

TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2}  # of sums of rows' gradients against autograd's own

PADDED = ("input_ids", "attention_mask", "token_type_ids")  # [rows, T], padded behind


class Private(Ddp):
    """Ddp whose step is the mechanism of `privacy`; a row's gradient is that of the mean loss of its targets.

    Rows' gradients come from Opacus's hooks, once these have proved right for the model: for every parameter as many
    as rows, and their sum what autograd gives. Else (relative positions, recomputed blocks) rows go one by one.
    """

    def __init__(self, privacy: Privacy, **options: Any) -> None:
        super().__init__(**{**options, "max_grad_norm": 0.0})  # rows are clipped, and their noisy sum is not
        self.privacy = privacy
        self.hooks: Any = None
        self.proven = False
        self.rows = 0  # of the micro-batch that the model sees now

    def setup(self, build_model: ModelFactory, build_optim: OptimFactory) -> None:
        """Build as Ddp does; refuse a model that mixes rows."""
        super().setup(build_model, build_optim)
        for name, module in self.model.named_modules():
            if isinstance(module, _BatchNorm):
                rule = f"{name} normalises by the whole batch, so that no row has a gradient of its own"
                raise RequestError.of("privacy", rule, "take a model without batch norm")
        self.sums = [torch.zeros_like(parameter, dtype=torch.float32) for _, parameter in self.trained]
        if self.privacy.hooks and not getattr(self.model, "is_gradient_checkpointing", False):
            try:
                self.hooks = attach_hooks(self.model)
            except NotImplementedError as error:
                self._give_up_hooks(str(error))
            else:
                self._repeat_shared_positions()

    def wrap(self, model: nn.Module) -> nn.Module:
        """Move to the device and take the weights of rank 0; gradients are summed in `step`, not in the backward."""
        model.to(self.device)
        if self.place.world_size > 1:
            for tensor in model.parameters():
                dist.broadcast(tensor.data, src=0)
        return model

    def forward_backward(self, micro: Batch, loss: LossFn, denominator: Tensor, *, last: bool) -> LossSum:
        """Add the rows' clipped gradients; `denominator` is not read, as the number of rows is itself private."""
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
        """Sum over ranks, add noise, divide by the expected number of rows, update."""
        step = self._updates() + 1
        noise = self.privacy.draw_noise(step, self.sums)
        for (_, parameter), total, drawn in zip(self.trained, self.sums, noise, strict=True):
            parameter.grad = (comm.total(total) + drawn).div_(self.privacy.expected_rows).to(parameter.dtype)
            total.zero_()
        stats = super().step(learning_rate)
        return replace(stats, metrics={"train/epsilon": self.privacy.epsilon(step)})

    def _take_one_by_one(self, micro: Batch, loss: LossFn) -> LossSum:
        """A backward for each row."""
        parameters = [parameter for _, parameter in self.trained]
        parts = []
        if self.hooks is not None:
            self.hooks.disable_hooks()
        for row, weight in zip(split_rows(micro), row_weights(micro).tolist(), strict=True):
            with self.precision():
                result = loss(self.module, row)
            result.loss.backward()
            gradients = [(i, p.grad) for i, p in enumerate(parameters) if p.grad is not None]
            norm = math.sqrt(sum(float(g.double().square().sum()) for _, g in gradients)) / weight
            for i, gradient in gradients:
                self.sums[i].add_(gradient, alpha=self._factor(norm) / weight)
            self.optimizer.zero_grad(set_to_none=True)
            parts.append(result.loss.detach())
        if self.hooks is not None:
            self.hooks.enable_hooks()
        return LossSum(torch.stack(parts).sum(), row_weights(micro).sum())

    def _take_together(self, micro: Batch, loss: LossFn) -> LossSum | None:
        """One backward, from which Opacus's hooks take the gradients of all rows; None where they are not sound."""
        state = self._chance()
        self.rows = len(micro.samples)
        try:
            with self.precision():
                result = loss(self.module, micro)
            result.loss.backward()
            fault = self._find_fault()
        except (torch.OutOfMemoryError, KeyboardInterrupt):
            raise
        except Exception as error:  # whatever a model does that the hooks do not foresee; row by row, it shows itself
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
        self._set_chance(state)
        return None

    def _add_clipped(self, weights: Tensor) -> None:
        taken = [(i, p.grad_sample.float()) for i, (_, p) in enumerate(self.trained) if p.grad_sample is not None]  # type: ignore[attr-defined]
        squares = torch.stack([gradient.flatten(1).square().sum(dim=1) for _, gradient in taken])
        norms = squares.double().sum(dim=0).sqrt() / weights
        factors = torch.tensor([self._factor(norm) for norm in norms.tolist()], device=weights.device) / weights
        for i, gradient in taken:
            self.sums[i].add_(torch.tensordot(factors.float(), gradient, dims=1))

    def _factor(self, norm: float) -> float:
        """What a row's gradient of this norm is multiplied with."""
        return 1.0 if norm <= self.privacy.max_grad_norm else self.privacy.max_grad_norm / norm

    def _find_fault(self) -> str | None:
        """Why what the hooks left is not the rows' gradients; sums are compared once."""
        total = math.sqrt(sum(float(p.grad.square().sum()) for _, p in self.trained if p.grad is not None))
        for name, parameter in self.trained:
            gradients: Any = parameter.grad_sample  # type: ignore[attr-defined]
            if gradients is None and parameter.grad is None:
                continue
            if not isinstance(gradients, Tensor) or gradients.shape != (self.rows, *parameter.shape):
                return f"{name} is not used once a row"
            if not self.proven:
                assert parameter.grad is not None
                miss = float((gradients.float().sum(dim=0) - parameter.grad.float()).norm())
                if not miss <= TOLERANCE[self.dtype] * (float(parameter.grad.norm()) + 1e-3 * total):
                    return f"{name}'s gradients of rows do not add up to its gradient"
        return None

    def _give_up_hooks(self, reason: str) -> None:
        if self.hooks is not None:
            self.hooks.remove_hooks()
            self.hooks = None
            for module in self.model.modules():  # what a failed attempt has left
                module.__dict__.pop("activations", None)
                for parameter in module.parameters(recurse=False):
                    parameter.__dict__.pop("_current_grad_sample", None)
        warnings.warn(f"gradients of rows are taken one by one, which is slower: {reason}", stacklevel=2)

    def _repeat_shared_positions(self) -> None:
        """Embeddings that are looked up once for all rows (positions) are looked up for each: values are the same."""

        def repeat(_: nn.Module, inputs: tuple[Any, ...]) -> tuple[Any, ...] | None:
            ids = inputs[0] if inputs else None
            if not (isinstance(ids, Tensor) and ids.ndim == 2 and len(ids) == 1 and self.rows > 1):
                return None
            return (ids.expand(self.rows, -1), *inputs[1:])

        for module in self.model.modules():
            if isinstance(module, nn.Embedding):
                module.register_forward_pre_hook(repeat)

    def _forget(self) -> None:
        """Clear what a backward left, also one that failed half-way."""
        self.rows = 0
        self.optimizer.zero_grad(set_to_none=True)
        for _, parameter in self.trained:
            parameter.grad_sample = None  # type: ignore[attr-defined]

    def _chance(self) -> tuple[Tensor, Tensor | None]:
        """Where dropout's generators stand; a failed attempt must not move them."""
        on_gpu = torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None
        return torch.get_rng_state(), on_gpu

    def _set_chance(self, state: tuple[Tensor, Tensor | None]) -> None:
        torch.set_rng_state(state[0])
        if state[1] is not None:
            torch.cuda.set_rng_state(state[1], self.device)


def row_weights(micro: Batch) -> Tensor:
    """[rows] by what each row's summed loss is divided to give its mean: its targets, at least one."""
    rows = len(micro.samples)
    if micro.weight is not None:  # of tasks whose rows all weigh the same
        return torch.full((rows,), micro.weight / rows, device=micro.targets.device)
    return torch.bincount(micro.documents, minlength=rows).clamp(min=1).float()


def split_rows(micro: Batch) -> Iterator[Batch]:
    """The rows of a padded micro-batch, each a micro-batch without padding of its own."""
    inputs = micro.inputs
    outputs: Tensor = inputs.get("decoder_input_ids", inputs["input_ids"])
    width = 1 if torch.equal(micro.positions, micro.documents) else outputs.shape[1]  # one output a row, or a token
    lengths = inputs["attention_mask"].sum(dim=1).tolist()
    for i, (sample, length) in enumerate(zip(micro.samples, lengths, strict=True)):
        own = micro.documents == i
        yield replace(
            micro,
            inputs={
                name: value[i : i + 1, :length] if name in PADDED else value[i : i + 1]
                for name, value in inputs.items()
            },
            targets=micro.targets[own],
            positions=micro.positions[own] - i * width,
            documents=torch.zeros_like(micro.documents[own]),
            tokens=int(length),
            samples=(sample,),
            weight=None if micro.weight is None else micro.weight / len(micro.samples),
        )
