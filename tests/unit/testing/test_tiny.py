"""Tiny models have the same weights each time, no dropout, and finite outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from dist_ft.testing import tiny


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_each_architecture_is_built_alike_and_computes(name: str) -> None:
    model = tiny.build(name)
    torch.manual_seed(5)
    again = tiny.build(name)
    assert all(torch.equal(one, other) for one, other in zip(model.parameters(), again.parameters(), strict=True))
    assert not [m for m in model.modules() if isinstance(m, nn.Dropout) and m.p > 0]
    ids = torch.arange(1, 9)[None]
    inputs = {"decoder_input_ids": ids} if model.config.is_encoder_decoder else {}
    first, second = (model(input_ids=ids, **inputs).logits for _ in range(2))  # in training mode
    assert first.shape[-1] == tiny.VOCABULARY and first.isfinite().all() and torch.equal(first, second)
    assert sum(p.numel() for p in model.parameters()) < 50_000


def test_what_is_passed_replaces_the_settings() -> None:
    config = tiny.make_config("bert", hidden_size=64, hidden_dropout_prob=0.3)
    assert (config.hidden_size, config.hidden_dropout_prob, config.attention_probs_dropout_prob) == (64, 0.3, 0.0)
    assert type(tiny.build("gpt2", "AutoModelForSequenceClassification")).__name__ == "GPT2ForSequenceClassification"
