"""A micro-batch on a device never makes the host wait for it, shown on device meta, whose tensors have no values.

Fake tensors of device cuda would need a torch with CUDA: autograd and indexing ask for the device.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.model.head import attach_head
from dist_ft.task.batches.tokens import collate_documents, sum_losses, sum_scores
from dist_ft.testing.tiny import build
from tests.samples import lora, samples_of

READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default, torch.ops.aten.equal.default}


class NoWait(TorchDispatchMode):
    """Fails where a value is read on the host, and where a tensor is copied between host and device."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        assert func not in READS, f"{func} waits for the device"
        given = {a.device.type for a in args if isinstance(a, Tensor) and (a.dim() or func in COPIES)}
        if func in COPIES and isinstance(result, Tensor):
            assert given <= {result.device.type}, f"{func} copies from {given} to {result.device.type}"
        return result


COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


def run(name: str, *, adapted: bool, compute: Any, chunked: bool = False) -> Tensor:
    """Compute the loss of three documents and its gradients on device meta; in chunks of 4 tokens if `chunked`."""
    rows = [np.arange(1, 1 + length) for length in (5, 9, 3)]
    samples = samples_of([[{"input_ids": row, "labels": row}] for row in rows])
    kernel = "eager" if name in ("gemma2", "gpt_oss") else "sdpa"
    plain = build(name)
    plain.set_attn_implementation(DOCUMENTS[kernel])
    model: nn.Module = lora(r=2).apply(find_anatomy(plain)) if adapted else plain
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
