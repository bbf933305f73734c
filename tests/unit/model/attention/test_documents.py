"""Documents of one row do not see each other, under every kernel and in every architecture that takes documents."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dist_ft.model.attention.choice import AttentionChoice, choose_attention
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.testing import tiny

LENGTHS = (9, 1, 14, 6)
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    **{name: (name, {}) for name in ("llama", "qwen2", "qwen3", "qwen3_moe", "gpt2", "opt")},
    "mistral-window": ("mistral", {"sliding_window": 5}),
    "gemma2-softcap-window": ("gemma2", {"sliding_window": 4}),
    "gpt-oss-sinks": ("gpt_oss", {"sliding_window": 6}),
}


def build(name: str) -> Any:
    architecture, changes = MODELS[name]
    return tiny.build(architecture, attn_implementation="eager", **changes)


def choose(requested: str, model: Any, device: str = "cpu", dtype: torch.dtype = torch.float32) -> AttentionChoice:
    return choose_attention(requested, type(model), model.config, torch.device(device), dtype)


@pytest.mark.parametrize("kernel", ["sdpa", "eager"])
@pytest.mark.parametrize("name", MODELS)
def test_one_row_equals_one_document_at_a_time(name: str, kernel: str) -> None:
    model = build(name).eval()
    choice = choose(kernel if kernel == "eager" else "auto", model)
    if kernel != choice.kernel:
        assert "sdpa" not in choice.implementation and "nothing else" in choice.reason
    if not choice.padding_free:
        pytest.fail(f"{name} should take documents")
    ids = torch.randint(1, 97, (1, sum(LENGTHS)))
    with torch.no_grad():
        apart = torch.cat([model(input_ids=part).logits for part in ids.split(LENGTHS, dim=1)], dim=1)
        model.set_attn_implementation(choice.implementation)
        positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
        together = model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS, use_cache=False).logits
    torch.testing.assert_close(together, apart, rtol=1e-4, atol=1e-5)


def test_gradients_too() -> None:
    model = build("llama")
    ids = torch.randint(1, 97, (1, sum(LENGTHS)))
    sum(model(input_ids=part).logits.square().sum() for part in ids.split(LENGTHS, dim=1)).backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.set_attn_implementation(DOCUMENTS["sdpa"])
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    model(input_ids=ids, position_ids=positions, document_lengths=LENGTHS).logits.square().sum().backward()
    for parameter, gradient in zip(model.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-5)


def test_rows_that_would_need_a_mask_are_refused() -> None:
    model = tiny.build("llama", attn_implementation=DOCUMENTS["sdpa"]).eval()
    with pytest.raises(AssertionError, match="documents that fill one row"):
        model(input_ids=torch.ones(2, 7, dtype=torch.int64), attention_mask=torch.ones(2, 7, dtype=torch.int64))
    with pytest.raises(AssertionError, match="documents that fill one row"):
        model.generate(torch.randint(1, 97, (1, 7)), max_new_tokens=8, do_sample=False)
