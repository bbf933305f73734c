"""Balance, load and entropy of routers are those of the whole batch, as transformers computes them."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.model.moe.routing import Routing
from dist_ft.state import Batch, LossSum
from dist_ft.task.batches.tokens import collate_documents, collate_padded, sum_losses
from dist_ft.testing.tiny import NARROW, build
from tests.samples import samples_of


class Alone:
    """An engine of one process, without anything."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    @torch.no_grad()
    def evaluate(self, micro: Batch, loss: Any) -> LossSum:
        found: LossSum = loss(self.model, micro)
        return found


@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("padded", [False, True])
def test_gradients_of_the_balance_loss_are_those_of_the_whole_batch(padded: bool, per_layer: bool) -> None:
    dice = np.random.default_rng(0)
    rows = [dice.integers(1, 97, size=length) for length in (5, 9, 3, 12)]
    segments = [{"input_ids": row, "labels": row} for row in rows]
    model = build("olmoe")
    collate: Any = collate_documents
    if padded:
        collate = collate_padded
    else:
        model.set_attn_implementation(DOCUMENTS["eager"])
    routing = Routing(find_anatomy(model), 0.7, 0.0, "train", per_layer=per_layer)
    micros = [collate(samples_of([segments[i]] for i in part)) for part in ((0, 3), (1, 2))]
    routing.survey(micros, Alone(model), sum_losses, lambda phase: None)  # type: ignore[arg-type]
    total = sum(micro.supervised for micro in micros)
    for micro in micros:
        (routing.loss(model, micro, sum_losses).loss / total).backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters()}
    told = routing.metrics()
    model.zero_grad()
    model.set_attn_implementation("eager")

    outputs = [model(input_ids=torch.from_numpy(row)[None], output_router_logits=True) for row in rows]
    losses = [
        nn.functional.cross_entropy(output.logits[0, :-1], torch.from_numpy(row[1:]), reduction="sum")
        for output, row in zip(outputs, rows, strict=True)
    ]
    layers = tuple(torch.cat(parts) for parts in zip(*(output.router_logits for output in outputs), strict=True))
    groups = [(layer,) for layer in layers] if per_layer else [layers]
    balance = torch.stack([load_balancing_loss_func(group, 4, 2) for group in groups]).mean()
    (torch.stack(losses).sum() / total + 0.7 * balance).backward()
    assert told["moe/aux_loss"] == pytest.approx(balance.item(), rel=1e-5)
    for name, p in model.named_parameters():
        torch.testing.assert_close(found[name], p.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_balance_does_not_depend_on_what_the_task_weighs() -> None:
    """The engine divides by the batch's weight, which of pairs, say, is not the number of targets."""
    rows = [np.arange(1, 8), np.arange(20, 31)]
    gradients = []
    for weight in (None, 2.0):
        model = build("olmoe")
        routing = Routing(find_anatomy(model), 0.7, 0.3, "train", per_layer=False)
        segments = [[{"input_ids": row, "labels": row}] for row in rows]
        micros = [replace(collate_padded(samples_of([segment])), weight=weight) for segment in segments]

        def nothing(model: nn.Module, batch: Batch) -> LossSum:
            found = sum_losses(model, batch)
            return LossSum(found.loss * 0, torch.tensor(batch.loss_weight))

        routing.survey(micros, Alone(model), nothing, lambda phase: None)  # type: ignore[arg-type]
        for micro in micros:
            (routing.loss(model, micro, nothing).loss / sum(m.loss_weight for m in micros)).backward()
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
    assert any(gradient.any() for gradient in gradients[0].values())
    torch.testing.assert_close(*gradients)


def test_metrics_tell_dead_experts_and_load() -> None:
    model = build("mixtral")
    anatomy = find_anatomy(model)
    for mixture in anatomy.mixtures:
        nn.init.zeros_(anatomy.part(mixture.router).weight)  # ties: the first two are chosen for every token
    routing = Routing(find_anatomy(model), 0.0, 0.0, "frozen", per_layer=False)
    row = np.arange(1, 8)
    micro = collate_padded(samples_of([[{"input_ids": row, "labels": row}]]))
    routing.survey([micro], Alone(model), sum_losses, lambda phase: None)  # type: ignore[arg-type]
    routing.loss(model, micro, sum_losses)
    told = routing.metrics()
    assert (told["moe/load_max"], told["moe/load_min"], told["moe/dead_experts"]) == (2.0, 0.0, 6.0)
    assert told["moe/router_entropy"] == pytest.approx(np.log(4)) == told["moe/layer_2/router_entropy"]
    assert told["moe/layer_0/dead_experts"] == 2 and told["moe/aux_loss"] == pytest.approx(2.0)


def test_equal_experts_give_the_dense_models_logits() -> None:
    dense = build("llama", **NARROW).eval()
    same = {"rms_norm_eps": dense.config.rms_norm_eps, "rope_parameters": dense.config.rope_parameters}
    mixture = build("mixtral", **same).eval()
    state = dense.state_dict()
    for name, parameter in mixture.named_parameters():
        if name.endswith("gate_up_proj"):
            mlp = name.replace("experts.gate_up_proj", "")
            one = torch.cat([state[f"{mlp}gate_proj.weight"], state[f"{mlp}up_proj.weight"]])
            parameter.data = one.expand_as(parameter).clone()
        elif name.endswith("experts.down_proj"):
            parameter.data = state[name.replace("experts.down_proj", "down_proj.weight")].expand_as(parameter).clone()
        elif not name.endswith("gate.weight"):
            parameter.data = state[name].clone()
    ids = torch.randint(1, 97, (2, 9))
    torch.testing.assert_close(mixture(input_ids=ids).logits, dense(input_ids=ids).logits, rtol=1e-4, atol=1e-5)
