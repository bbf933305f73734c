"""Routing measured and balanced over the global batch: the auxiliary loss, the z-loss, and `moe/*` metrics.

With C[e] the tokens of the global batch that chose expert e, p[t, e] the router's probabilities and N the number of
tokens, the balance loss of Switch Transformers (Fedus et al. 2021, eq. 4-6), as in transformers'
`load_balancing_loss_func`, is

    E * sum_e f[e] * P[e],  f[e] = C[e] / N,  P[e] = sum_t p[t, e] / N

with sums over the tokens of all layers (`moe.aux_loss_per_layer`: per layer, then the mean). The z-loss (Zoph et al.
2022, eq. 5) is the mean of logsumexp(logits) ** 2. f has no gradient, so once it is known, the gradient of the loss is
a sum over tokens and can be accumulated over micro-batches. To compute f before the first backward, a step with one
micro-batch per rank sums the counts between forward and backward. A step with several micro-batches first runs all
forwards without gradients and dropout, which is about a third more work.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...config.method import MethodConfig
from ...config.moe import MoeConfig
from ...errors import RequestError
from ...process import comm
from ...protocols import Engine, LossFn
from ...state import Anatomy, Batch, Beat, LossSum, Metrics, Mixture, RouterForm, StepInfo
from .policy import resolve_aux_loss_coef, resolve_policy


class Output(NamedTuple):
    """What a router gave for N tokens; padding is among them and counts nothing, since a selection would wait."""

    logits: Tensor  # [N, experts] float32
    chosen: Tensor  # [N, top_k]
    real: Tensor  # [N] float32: 1 for a token, 0 for padding


class Routing:
    """Record the outputs of a model's routers and add the losses that balance them.

    Args:
        anatomy: Anatomy of the model, after its method was applied.
        aux_loss_coef: Factor of the balance loss.
        z_loss_coef: Factor of the z-loss.
        policy: Router policy, for `describe`.
        per_layer: Whether to balance each layer separately instead of all layers together.

    Raises:
        RequestError: Layers have different numbers of experts and cannot be balanced together.
    """

    def __init__(
        self, anatomy: Anatomy, aux_loss_coef: float, z_loss_coef: float, policy: str, *, per_layer: bool
    ) -> None:
        self.mixtures = [mixture for mixture in anatomy.mixtures if mixture.form is not None]
        self.forms = [mixture.form for mixture in self.mixtures if mixture.form is not None]
        self.aux_loss_coef = aux_loss_coef
        self.z_loss_coef = z_loss_coef
        self.policy = policy
        self.per_layer = per_layer
        self.experts = [mixture.num_experts for mixture in self.mixtures]
        if len(set(self.experts)) > 1 and not per_layer:
            rule = f"layers have {sorted(set(self.experts))} experts and cannot be balanced together"
            raise RequestError.of("moe.aux_loss_per_layer", rule, "set moe.aux_loss_per_layer=true")
        self.seen: dict[str, Any] | None = None  # outputs of routers, and of their linear layers, during a forward
        self.shares: Tensor | None = None  # f of the global batch: [layers, experts]
        self.tokens = 0.0  # N of the global batch
        self.weight = 0.0  # by which the engine divides the loss of the global batch
        self.alone = True  # one micro-batch per rank and step
        self.device = torch.device("cpu")  # of the routers, known from their first outputs
        self.clear()
        watched = {m.router for m in self.mixtures} | {form.logits_of for form in self.forms}
        for name in sorted(watched):
            anatomy.part(name).register_forward_hook(self._watcher(name))

    def measured(self) -> Iterator[tuple[Mixture, RouterForm]]:
        """Yield the mixtures with the forms of their routers."""
        return zip(self.mixtures, self.forms, strict=True)

    def clear(self) -> None:
        """Reset the sums per layer and expert, which are float64 on the device of the routers."""
        shape = (len(self.experts), max(self.experts))
        self.counts, self.masses = (torch.zeros(shape, dtype=torch.float64, device=self.device) for _ in range(2))
        self.entropies, self.squares = (
            torch.zeros(shape[0], dtype=torch.float64, device=self.device) for _ in range(2)
        )

    def survey(self, micros: Sequence[Batch], engine: Engine, loss: LossFn, beat: Beat) -> None:
        """Count the routing of a step with these micro-batches in advance, if it is needed. Collective."""
        self.clear()
        sums = torch.tensor([[m.tokens, m.loss_weight] for m in micros], dtype=torch.float64).sum(dim=0)
        self.tokens, self.weight = comm.total(sums).tolist()
        self.shares, self.alone = None, len(micros) == 1
        if self.aux_loss_coef and not self.alone:
            counts: list[Tensor] = []

            def count(model: nn.Module, batch: Batch) -> LossSum:
                result, outputs = self._watch(model, batch, loss)
                counts.append(self._counts(outputs))
                return result

            for i, micro in enumerate(micros, start=1):
                beat(f"routing of micro-batch {i} of {len(micros)}")
                engine.evaluate(micro, count)
            self._set_shares(torch.stack(counts).sum(dim=0))

    def loss(self, model: nn.Module, batch: Batch, loss: LossFn) -> LossSum:
        """Compute `loss` of the micro-batch and add the gradient of the routers' losses.

        The value of the loss is that of the task, so that curves with and without balancing can be compared; the
        routers' losses are separate metrics. They are scaled by the weight by which the engine divides.
        """
        result, outputs = self._watch(model, batch, loss)
        counts = self._counts(outputs)
        if self.aux_loss_coef and self.alone:
            self._set_shares(counts.clone())
        self._move(counts.device)
        self.counts += counts
        extra = self._extra(outputs)
        if not (self.aux_loss_coef or self.z_loss_coef):
            return result
        extra = extra * self.weight
        return replace(result, loss=result.loss + (extra - extra.detach()))

    def describe(self) -> str:
        """Describe the experts, the coefficients and the policy in one line."""
        sizes = " or ".join(str(n) for n in sorted(set(self.experts)))
        return (
            f"{sizes} experts in each of {len(self.mixtures)} layers, {self.mixtures[0].top_k} per token; balance loss "
            f"{self.aux_loss_coef:g}, z-loss {self.z_loss_coef:g}; routers: {self.policy}"
        )

    def metrics(self) -> Metrics:
        """Return `moe/*` of the step's global batch. Collective."""
        columns = [self.counts, self.masses, self.entropies[:, None], self.squares[:, None]]
        sums = comm.total(torch.cat(columns, dim=1).cpu())
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

    def _watcher(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def watch(module: nn.Module, inputs: Any, output: Any) -> None:
            # Only recorded: gradient checkpointing calls this again in the backward.
            if self.seen is not None:
                assert name not in self.seen, "a router is called once in a forward"
                self.seen[name] = output

        return watch

    def _move(self, device: torch.device) -> None:
        """Keep the sums on the device that computes the routers."""
        if device != self.device:
            self.device = device
            self.clear()

    def _watch(self, model: nn.Module, batch: Batch, loss: LossFn) -> tuple[LossSum, list[Output]]:
        """Return the loss and, for each layer, what its router gave."""
        self.seen = {}
        try:
            result = loss(model, batch)
            seen = [(self.seen[m.router], self.seen[f.logits_of]) for m, f in self.measured()]
        finally:
            self.seen = None
        mask = batch.inputs.get("attention_mask")
        outputs = []
        for (output, source), (mixture, form) in zip(seen, self.measured(), strict=True):
            logits = (source if form.logits_at is None else source[form.logits_at]).reshape(-1, mixture.num_experts)
            if form.indices_at is None:
                chosen = logits.detach().topk(mixture.top_k, dim=-1).indices
            else:
                chosen = output[form.indices_at].reshape(-1, mixture.top_k)
            logits = logits.float()
            if mask is None:
                real = torch.ones_like(logits[:, 0])
            else:
                real = mask.flatten().float()
                logits = logits.masked_fill(real[:, None] == 0, 0.0)  # no gradient, whatever padding gave
            outputs.append(Output(logits, chosen, real))
        return result, outputs

    def _counts(self, outputs: list[Output]) -> Tensor:
        """Return how many tokens chose each expert, `[layers, experts]`; a bincount would wait for the device."""
        counted = []
        for output in outputs:
            none = torch.zeros(max(self.experts), dtype=torch.float64, device=output.chosen.device)
            tokens = output.real.double()[:, None].expand(output.chosen.shape)
            counted.append(none.index_add(0, output.chosen.flatten(), tokens.flatten()))
        return torch.stack(counted)

    def _set_shares(self, counts: Tensor) -> None:
        self.shares = comm.total(counts) / self.tokens

    def _weights(self, shares: Tensor) -> Tensor:
        """Return the coefficients of the summed probabilities in the balance loss, `[layers, experts]`."""
        if not self.per_layer:
            shares = shares.mean(dim=0, keepdim=True).expand_as(shares)
        rows = [share * experts for share, experts in zip(shares, self.experts, strict=True)]
        return torch.stack(rows) / (self.tokens * len(self.experts))

    def _extra(self, outputs: list[Output]) -> Tensor:
        """Return this micro-batch's share of the scaled routers' losses, and add to the sums for metrics."""
        weights = None if self.shares is None else self._weights(self.shares)
        extra = torch.zeros((), device=outputs[0].logits.device)
        for i, ((logits, _, real), form) in enumerate(zip(outputs, self.forms, strict=True)):
            if form.sigmoid:  # as DeepSeek-V3 (2024), eq. 18
                scores = logits.sigmoid()
                probabilities = scores / scores.sum(dim=-1, keepdim=True)
            else:
                probabilities = logits.softmax(dim=-1)
            mass = (probabilities * real[:, None]).sum(dim=0)
            square = (logits.logsumexp(dim=-1).square() * real).sum()
            experts = self.experts[i]
            with torch.no_grad():
                self.masses[i, :experts] += mass.double()
                self.squares[i] += square.double()
                self.entropies[i] += (torch.special.entr(probabilities) * real[:, None]).sum().double()
            if weights is not None:
                extra = extra + self.aux_loss_coef * (mass * weights[i, :experts].to(mass)).sum()
            if self.z_loss_coef:
                extra = extra + self.z_loss_coef * square / (self.tokens * len(self.experts))
        return extra


class RoutingHook:
    """Hook that counts the routing of the global batch before a step and reports `moe/*` after it.

    Args:
        routing: Routing of the model.
        engine: Engine that runs the model.
        loss: Loss of the task, without the routers' losses.
        beat: Reports progress to the watchdog.
    """

    def __init__(self, routing: Routing, engine: Engine, loss: LossFn, beat: Beat) -> None:
        self.routing, self.engine, self.loss, self.beat = routing, engine, loss, beat

    def before_step(self, micros: Sequence[Batch]) -> None:
        """Count the experts that the global batch chooses, if the balance loss needs it."""
        self.routing.survey(micros, self.engine, self.loss, self.beat)

    def after_step(self, info: StepInfo) -> Metrics:
        """Return `moe/*`."""
        return self.routing.metrics()


def build_routing(config: MoeConfig, method: MethodConfig, anatomy: Anatomy) -> Routing | None:
    """Build the recorder of a mixture's routers; None for a dense model, or if no router can be measured."""
    if not any(mixture.form for mixture in anatomy.mixtures):
        return None
    coefficient = resolve_aux_loss_coef(config, method, anatomy)
    policy = resolve_policy(config, method)
    return Routing(anatomy, coefficient, config.z_loss_coef, policy, per_layer=config.aux_loss_per_layer)
