"""A micro-batch on a device never makes the host wait for it, shown on device meta, whose tensors have no values.

Fake tensors of device cuda would need a torch with CUDA: autograd and indexing ask for the device.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ft.config.task import PreferenceConfig
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.model.head import attach_head
from dist_ft.model.moe.routing import Routing
from dist_ft.model.noise import add_embedding_noise
from dist_ft.process.sums import Sums
from dist_ft.state import Anatomy
from dist_ft.task.batches.tokens import collate_documents, sum_losses, sum_scores
from dist_ft.task.by_set import LossBySet
from dist_ft.task.preference import Preference
from dist_ft.testing.tiny import build
from tests.samples import lora, samples_of

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class NoWait(TorchDispatchMode):
    """Fails where a value is read on the host, and where a tensor is copied between host and device with a wait."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in READS, f"{func} waits for the device"
        given = {a.device.type for a in args if isinstance(a, Tensor) and (a.dim() or func in COPIES)}
        if func in COPIES and isinstance(result, Tensor) and not (kwargs or {}).get("non_blocking"):
            assert given <= {result.device.type}, f"{func} copies from {given} to {result.device.type}"
        return result


COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def run(name: str, *, adapted: bool, compute: Any, chunked: bool = False) -> Tensor:
    """Compute the loss of three documents and its gradients on device meta; in chunks of 4 tokens if `chunked`."""
    rows = [np.arange(1, 1 + length) for length in (5, 9, 3)]
    rows += [np.arange(2, 8)] if compute is preferred else []  # pairs
    samples = samples_of([[{"input_ids": row, "labels": row}] for row in rows])
    kernel = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    plain = build(name)
    plain.set_attn_implementation(DOCUMENTS[kernel])
    anatomy = find_anatomy(plain)
    model: nn.Module = lora(r=2).apply(anatomy) if adapted else plain
    if isinstance(compute, Routed):
        compute.watch(anatomy)
    head = attach_head(plain)[0] if chunked else None
    if head is not None:
        head.rows = 4
    model.to(torch.bfloat16).to("meta").train()
    batch = collate_documents(samples).to("meta")
    with NoWait():
        result = compute(model, batch, head)
        result.loss.backward()
    learning = [p for p in model.parameters() if p.requires_grad]
    assert learning and all(p.grad is not None for p in learning)
    loss: Tensor = result.loss
    return loss


@pytest.mark.parametrize("chunked", [False, True])
@pytest.mark.parametrize("compute", [sum_losses, sum_scores])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["llama", "gemma2", "gpt_oss", "qwen3_moe"])
def test_documents_are_computed_without_a_wait(name: str, adapted: bool, compute: Any, chunked: bool) -> None:
    assert run(name, adapted=adapted, compute=compute, chunked=chunked).is_meta


class Routed:
    """Balances the routers, too; their mixtures are found while the model has values."""

    def watch(self, anatomy: Anatomy) -> None:
        self.routing = Routing(anatomy, 0.5, 0.1, "train", per_layer=False)

    def __call__(self, model: Any, batch: Any, head: Any) -> Any:
        self.routing.tokens = self.routing.weight = float(batch.tokens)
        result = self.routing.loss(model, batch, lambda m, b: sum_losses(m, b, head))
        assert self.routing.counts.is_meta and self.routing.masses.is_meta
        return result


def by_set(model: Any, batch: Any, head: Any) -> Any:
    class Inner:
        loss = staticmethod(lambda model, batch: sum_losses(model, batch, head))

    task: Any = Inner()
    result = LossBySet(task, {"one": 1, "two": 2}).loss(model, batch)
    assert result.counts["loss@two"].is_meta
    return result


def preferred(model: Any, batch: Any, head: Any) -> Any:
    task = Preference(PreferenceConfig(name="preference", loss_type="ipo"), padding_free=True)
    task.head = head
    one = torch.zeros(4, dtype=torch.float64, device="meta")
    return task.loss(model, replace(batch, samples=(0, 0, 1, 1), reference=one, weight=2.0))


@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "gpt_oss", "deepseek_v3"])
def test_routers_are_balanced_without_a_wait(name: str, adapted: bool) -> None:
    assert run(name, adapted=adapted, compute=Routed()).is_meta


@pytest.mark.parametrize("compute", [by_set, preferred])
def test_mixtures_of_data_and_preferences_without_a_wait(compute: Any) -> None:
    assert run("llama", adapted=False, compute=compute).is_meta


def test_sums_stay_on_the_device_until_the_step_ends() -> None:
    def compute(model: Any, batch: Any, head: Any) -> Any:
        result, sums = sum_scores(model, batch, head), Sums()
        for _ in range(2):
            sums.add(result)
        assert all(value.is_meta for value in sums.sums.values())
        return result

    run("llama", adapted=False, compute=compute)


def test_noise_on_embeddings_without_a_wait() -> None:
    def compute(model: Any, batch: Any, head: Any) -> Any:
        add_embedding_noise(model, model.get_input_embeddings(), 5.0)
        return sum_losses(model, batch, head)

    run("llama", adapted=False, compute=compute)


@pytest.mark.parametrize(
    "wait", [Tensor.item, Tensor.cpu, Tensor.tolist, lambda loss: torch.tensor(1.0).to(loss.device)]
)
def test_a_wait_is_noticed(wait: Any) -> None:
    def loss(model: Any, batch: Any, head: Any) -> Any:
        result = sum_losses(model, batch)
        wait(result.losses[0])
        return result

    with pytest.raises(Exception, match=r"copies|waits|[Mm]eta"):
        run("llama", adapted=False, compute=loss)
