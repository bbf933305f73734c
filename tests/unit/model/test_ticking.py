"""Loading and packing a model tick for each tensor."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from dist_ft.model.quantize import quantize
from dist_ft.model.ticking import ticking


def test_each_tensor_that_is_loaded_and_each_layer_that_is_packed_ticks(tiny_llama: Path) -> None:
    ticks: list[str] = []
    with ticking(ticks.append):
        model = AutoModelForCausalLM.from_pretrained(tiny_llama)
    tensors = len(dict(model.named_parameters()))
    assert len(ticks) == tensors and ticks[-1] == f"Loading weights, item {tensors}"
    ticks.clear()
    with ticking(ticks.append):
        quantize(model, "nf4", torch.float32, weights=True)
    assert len(ticks) == 7 * len(model.model.layers), "each linear layer of a block"


def test_afterwards_nothing_ticks(tiny_llama: Path) -> None:
    ticks: list[str] = []
    before = logging.set_tqdm_hook(None)
    try:
        with ticking(ticks.append):
            pass
        AutoModelForCausalLM.from_pretrained(tiny_llama)
        assert not ticks
    finally:
        logging.set_tqdm_hook(before)


def test_a_bar_behaves_as_without_ticks() -> None:
    ticks: list[str] = []
    with ticking(ticks.append), logging.tqdm(total=3, desc="files", disable=True) as bar:
        bar.update(2)
        bar.set_postfix_str("x")
    assert ticks == ["files, item 1"]
