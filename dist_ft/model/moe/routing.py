"""Routing seen and balanced over the global batch: the auxiliary loss, the z-loss, and `moe/*` metrics.

With C[e] the tokens of the global batch that chose expert e, p[t, e] the router's probabilities and N its tokens, the
balance loss of Switch Transformers (Fedus et al. 2021, eq. 4-6), as transformers' `load_balancing_loss_func` has it, is

    E * sum_e f[e] * P[e],  f[e] = C[e] / N,  P[e] = sum_t p[t, e] / N

with sums over the tokens of all layers (`moe.aux_loss_per_layer`: for each layer, then the mean). The z-loss (Zoph et
al. 2022, eq. 5) is the mean of logsumexp(logits) ** 2. f is no function of the weights, so the gradient is a sum over
tokens once f is known, and does not depend on how the batch is cut. To know f before the first backward, a step of
one micro-batch a rank sums counts between forward and backward; a step of several first runs all of them forward
without gradients, without dropout: about a third more work.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ...config.method import MethodConfig
from ...config.moe import MoeConfig
from ...errors import RequestError
from ...process import comm
from ...state import Batch, Engine, LossFn, LossSum, Metrics, Task
from ..anatomy import Mixture, find_mixtures
from ..router_form import RouterForm, find_form
from .policy import resolve_aux_loss_coef, resolve_policy

Beat = Callable[[str], None]


@dataclass(frozen=True)
class Watched:
    """What of a run sees a mixture's routers: the loss, before a step its micro-batches, after it the measuring."""

    task: Task
    micro_batches: Callable[[int], list[Batch]]
    measure: Callable[[float, int, int], Metrics]


class Routing:
    """Watches the routers of a model and adds what balances them to the loss.

    Args:
        model: with its adapters, before an engine distributes it.
        aux_loss_coef: of the balance loss.
        z_loss_coef: of the z-loss.
        policy: of the routers, to be told.
        per_layer: balance each layer instead of their sum.

    Raises:
        RequestError: layers have unlike numbers of experts, and are to be balanced together.
    """

    def __init__(
        self, model: nn.Module, aux_loss_coef: float, z_loss_coef: float, policy: str, *, per_layer: bool
    ) -> None:
        self.mixtures: list[Mixture] = find_mixtures(model)
        self.forms: list[RouterForm] = [find_form(mixture, model) for mixture in self.mixtures]
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.policy = policy
        self.per_layer = per_layer
        self.experts = [mixture.num_experts for mixture in self.mixtures]
        if len(set(self.experts)) > 1 and not per_layer:
            rule = f"layers have {sorted(set(self.experts))} experts, and cannot be balanced together"
            raise RequestError.of("moe.aux_loss_per_layer", rule, "set moe.aux_loss_per_layer=true")
        self.seen: dict[int, Any] | None = None  # the layers' outputs while a forward is watched
        self.shares: Tensor | None = None  # f of the global batch: [layers, experts]
        self.tokens = 0.0  # N of the global batch
        self.weight = 0.0  # what the engine divides the global batch's loss by
        self.alone = True  # one micro-batch a rank and step
        self.clear()
        for i, mixture in enumerate(self.mixtures):
            mixture.router.register_forward_hook(self._watcher(i))

    def clear(self) -> None:
        """Forget the step before: sums by layer and expert, in float64 on the CPU."""
        shape = (len(self.experts), max(self.experts))
        self.counts, self.masses = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        self.entropies, self.squares = torch.zeros(shape[0]).double(), torch.zeros(shape[0]).double()

    def survey(self, micros: list[Batch], engine: Engine, loss: LossFn, beat: Beat) -> list[Batch]:
        """Get ready for a step of these micro-batches; gives them back. Every rank takes part."""
        self.clear()
        sums = torch.tensor([[m.tokens, m.loss_weight] for m in micros], dtype=torch.float64).sum(dim=0)
        self.tokens, self.weight = comm.total(sums).tolist()
        self.shares, self.alone = None, len(micros) == 1
        if self.aux_loss_coef and not self.alone:
            counts = torch.zeros_like(self.counts)

            def count(model: nn.Module, batch: Batch) -> LossSum:
                result, outputs = self._watch(model, batch, loss)
                counts.add_(self._counts(outputs))
                return result

            for i, micro in enumerate(micros, start=1):
                beat(f"routing of micro-batch {i} of {len(micros)}")
                engine.evaluate(micro, count)
            self._set_shares(counts)
        return micros

    def loss(self, model: nn.Module, batch: Batch, loss: LossFn) -> LossSum:
        """`loss` of the micro-batch, whose gradient is also that of the routers' losses.

        Its value stays the task's, so that curves with and without balancing can be compared; the routers' losses
        are metrics of their own. The engine divides by the weight of the global batch, hence that as a factor.
        """
        result, outputs = self._watch(model, batch, loss)
        counts = self._counts(outputs)
        if self.aux_loss_coef and self.alone:
            self._set_shares(counts.clone())
        self.counts += counts
        extra = self._extra(outputs)
        if not (self.aux_loss_coef or self.z_loss_coef):
            return result
        extra = extra * self.weight
        return replace(result, loss=result.loss + (extra - extra.detach()))

    def describe(self) -> str:
        """What is watched, and the losses' coefficients."""
        sizes = " or ".join(str(n) for n in sorted(set(self.experts)))
        return (
            f"{sizes} experts in each of {len(self.mixtures)} layers, {self.forms[0].top_k} a token; balance loss "
            f"{self.aux_loss_coef:g}, z-loss {self.z_loss_coef:g}; routers: {self.policy}"
        )

    def metrics(self) -> Metrics:
        """`moe/*` of the step's global batch. Every rank takes part."""
        columns = [self.counts, self.masses, self.entropies[:, None], self.squares[:, None]]
        sums = comm.total(torch.cat(columns, dim=1))
        width = self.counts.shape[1]
        counts, masses = sums[:, :width], sums[:, width : 2 * width]
        entropies, squares = sums[:, -2] / self.tokens, sums[:, -1] / self.tokens
        loads = [row[:n] * n / row.sum() for row, n in zip(counts, self.experts, strict=True)]
        found: dict[str, float] = {
            "moe/load_max": max(float(load.max()) for load in loads),
            "moe/load_min": min(float(load.min()) for load in loads),
            "moe/dead_experts": float(sum(int((load == 0).sum()) for load in loads)),
            "moe/router_entropy": float(entropies.mean()),
            "moe/aux_loss": float((self._weights(counts / self.tokens) * masses).sum()),
            "moe/z_loss": float(squares.mean()),
        }
        for mixture, load, entropy in zip(self.mixtures, loads, entropies, strict=True):
            name = f"moe/layer_{mixture.layer}"
            found[f"{name}/load_max"], found[f"{name}/load_min"] = float(load.max()), float(load.min())
            found[f"{name}/dead_experts"] = float((load == 0).sum())
            found[f"{name}/router_entropy"] = float(entropy)
        return found

    def _watcher(self, i: int) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            # Only kept: computing here would be recomputed under gradient checkpointing, where backward calls again.
            if self.seen is not None:
                assert i not in self.seen, "a router is called once in a forward"
                self.seen[i] = output

        return watch

    def _watch(self, model: nn.Module, batch: Batch, loss: LossFn) -> tuple[LossSum, list[tuple[Tensor, Tensor]]]:
        """The loss, and each layer's logits [N, experts] float32 and chosen experts [N, top_k] of the real tokens."""
        self.seen = {}
        try:
            result = loss(model, batch)
            seen = [self.seen[i] for i in range(len(self.mixtures))]
        finally:
            self.seen = None
        mask = batch.inputs.get("attention_mask")
        real = None if mask is None else mask.flatten().bool()
        outputs = []
        for output, form, experts in zip(seen, self.forms, self.experts, strict=True):
            logits = (output if form.logits_at is None else output[form.logits_at]).reshape(-1, experts)
            if form.indices_at is None:
                chosen = logits.detach().topk(form.top_k, dim=-1).indices
            else:
                chosen = output[form.indices_at].reshape(-1, form.top_k)
            if real is not None:
                logits, chosen = logits[real], chosen[real]
            outputs.append((logits.float(), chosen))
        return result, outputs

    def _counts(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        width = max(self.experts)
        rows = [torch.bincount(chosen.flatten(), minlength=width) for _, chosen in outputs]
        return torch.stack(rows).double().cpu()

    def _set_shares(self, counts: Tensor) -> None:
        self.shares = comm.total(counts) / self.tokens

    def _weights(self, shares: Tensor) -> Tensor:
        """[layers, experts]: what the balance loss is linear in the probabilities' sums by."""
        if not self.per_layer:
            shares = shares.mean(dim=0, keepdim=True).expand_as(shares)
        experts = torch.tensor(self.experts, dtype=torch.float64)[:, None]
        return shares * experts / (self.tokens * len(self.experts))

    def _extra(self, outputs: list[tuple[Tensor, Tensor]]) -> Tensor:
        """This micro-batch's part of the routers' losses, with their coefficients; notes the sums for metrics."""
        weights = None if self.shares is None else self._weights(self.shares)
        extra = torch.zeros((), device=outputs[0][0].device)
        for i, ((logits, _), form) in enumerate(zip(outputs, self.forms, strict=True)):
            if form.sigmoid:  # as DeepSeek-V3 (2024), eq. 18
                scores = logits.sigmoid()
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            else:
                probabilities = logits.softmax(dim=-1)
            mass = probabilities.sum(dim=0)
            square = logits.logsumexp(dim=-1).square().sum()
            experts = self.experts[i]
            with torch.no_grad():
                self.masses[i, :experts] += mass.double().cpu()
                self.squares[i] += square.double().cpu()
                self.entropies[i] += torch.special.entr(probabilities).sum().double().cpu()
            if weights is not None:
                extra = extra + self.aux_loss_coef * (mass * weights[i, :experts].to(mass)).sum()
            if self.z_loss_coef:
                extra = extra + self.z_loss_coef * square / (self.tokens * len(self.experts))
        return extra


def build_routing(config: MoeConfig, method: MethodConfig, model: nn.Module) -> list[Routing]:
    """The watch over a mixture's routers; empty for a dense model."""
    if not find_mixtures(model):
        return []
    coefficient = resolve_aux_loss_coef(config, method, model)
    policy = resolve_policy(config, method)
    return [Routing(model, coefficient, config.z_loss_coef, policy, per_layer=config.aux_loss_per_layer)]


def watch(routing: Routing, run: Watched, engine: Engine, beat: Beat) -> Watched:
    """The same with routers counted before a step, balanced in its loss and measured after it."""
    plain = run.task.loss
    task: Any = copy.copy(run.task)
    task.loss = lambda model, batch: routing.loss(model, batch, plain)
    return Watched(
        task,
        lambda step: routing.survey(run.micro_batches(step), engine, plain, beat),
        lambda *step: {**run.measure(*step), **routing.metrics()},
    )
