"""Boundaries of a micro-batch are made once."""

from __future__ import annotations

import pytest
import torch

from dist_ft.model.attention.boundaries import boundaries_of
from dist_ft.testing import tiny


@pytest.mark.usefixtures("flash_attn")
def test_a_micro_batch_makes_its_boundaries_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """FSDP2 copies the inputs of every block, so that boundaries are recognised by their values."""
    model = tiny.build("llama", attn_implementation="documents_fa2").bfloat16().eval()
    made = []
    monkeypatch.setattr(torch.Tensor, "cumsum", lambda *a, f=torch.Tensor.cumsum, **k: made.append(1) or f(*a, **k))
    for block in model.model.layers:
        block.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"document_lengths": tuple(kwargs["document_lengths"])}),
            with_kwargs=True,
        )
    lengths = (5, 7)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    model(input_ids=torch.ones(1, 12, dtype=torch.int64), position_ids=positions, document_lengths=lengths)
    assert len(made) == 1


def test_other_documents_have_other_boundaries() -> None:
    device = torch.device("cpu")
    first, again, other = (boundaries_of(lengths, device) for lengths in ((4, 8), (4, 8), (8, 4)))
    assert first is again and first is not other
    assert (first.ends.tolist(), other.ends.tolist(), other.longest) == ([0, 4, 12], [0, 8, 12], 8)
    assert other.documents.tolist() == [0] * 8 + [1] * 4
