"""Estimated activations against what the CPU allocates for the same micro-batch, as torch's profiler records it."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from dist_ft.config.run import RunConfig
from dist_ft.inspect.activations import Living, estimate_activations, measure_peak
from dist_ft.model.anatomy import find_anatomy
from dist_ft.model.attention.documents import DOCUMENTS
from dist_ft.model.head import OutputHead, attach_head
from dist_ft.prepare import prepare
from dist_ft.task.batches.tokens import collate_documents, sum_losses
from dist_ft.testing.tiny import build, save
from tests.runs import token_run
from tests.samples import lora, samples_of

SIZES = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 3, "num_key_value_heads": 2}
LENGTHS = (300, 40, 172)


class Documents:
    """The loss of a causal language model; from chunks of its logits if `head` is given."""

    def __init__(self, head: OutputHead | None = None) -> None:
        self.head = head

    def loss(self, model: nn.Module, batch: Any) -> Any:
        return sum_losses(model, batch, self.head)


def batch_of() -> Any:
    rows = [np.arange(length) % 60 for length in LENGTHS]
    return collate_documents(samples_of([[{"input_ids": row, "labels": row}] for row in rows]))


def allocated_peak(model: nn.Module, task: Documents, batch: Any) -> int:
    """Bytes at most of what a forward and a backward allocate."""
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
    task.loss(model, batch).loss.backward()  # caches of the first call
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        task.loss(model, batch).loss.backward()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    now = peak = 0
    for event in sorted(events, key=lambda e: e.start_ns()):
        now += event.nbytes()
        peak = max(peak, now)
    return peak


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("llama", torch.float32),
        ("llama", torch.bfloat16),
        ("gemma2", torch.bfloat16),
        ("qwen3_moe", torch.bfloat16),  # the fake kernel of its grouped experts supports no other dtype
    ],
)
def test_the_estimate_is_what_is_allocated(name: str, dtype: torch.dtype, adapted: bool, recompute: bool) -> None:
    model: nn.Module = build(name, **SIZES)
    model.set_attn_implementation(DOCUMENTS["eager" if name == "gemma2" else "sdpa"])
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    if adapted:
        model = lora(r=4).apply(find_anatomy(model))
    model = model.to(dtype).train()
    estimated = measure_peak(copy.deepcopy(model).to("meta"), Documents(), batch_of())
    found = allocated_peak(model, Documents(), batch_of())
    assert estimated == pytest.approx(found, rel=0.02)


def test_logits_of_a_chunk_count_instead_of_all() -> None:
    peaks = []
    for at in ("meta", "cpu"):
        model = build("llama", **SIZES, vocab_size=8192).bfloat16().to(at).train()
        head, _ = attach_head(model, always=True)
        measure = measure_peak if at == "meta" else allocated_peak
        peaks.append(measure(model, Documents(head), batch_of()))
    assert peaks[0] == pytest.approx(peaks[1], rel=0.02)
    assert peaks[0] < 0.5 * 12 * 8192 * sum(LENGTHS)


def test_storage_is_counted_once_and_while_it_is_alive() -> None:
    known = torch.zeros(1000)
    with Living([known]) as living:
        one = torch.zeros(256)
        view = one.view(16, 16)[2:]
        del one
        assert living.now == living.peak == 1024
        same = known.view(10, 100)
        two = torch.ones(8, dtype=torch.int64) + 1
        del view, two
        assert (living.now, living.peak) == (0, 1024 + 2 * 64)
    assert same.numel() == 1000


def test_the_largest_micro_batch_is_the_longest_rows(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": [7] * n, "labels": [7] * n}) + "\n" for n in (5, 48, 17, 42)))
    config = RunConfig.model_validate(
        token_run(tmp_path / "run", str(tiny_llama), str(rows), "ddp", 2, 2, False, {"name": "full"})
    )
    part = estimate_activations(config, prepare(config))
    assert part.why == "2 longest samples, 90 tokens; kept for the backward"
    assert part.device > 90 * 512 * 4  # the logits alone


def test_a_kernel_for_gpus_is_estimated_without_one(tiny_llama: Path, tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [7] * 9, "labels": [7] * 9}) + "\n")
    given = token_run(tmp_path / "run", str(tiny_llama), str(rows), "ddp", 1, 1, False, {"name": "full"})
    given["model"]["attn_implementation"] = "varlen"
    config = RunConfig.model_validate(given)
    assert estimate_activations(config, prepare(config)).device > 0


def test_what_cannot_be_estimated_says_why(tmp_path: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [7] * 9, "labels": [7] * 9}) + "\n")
    model = save("qwen3_moe", tmp_path / "model")
    config = RunConfig.model_validate(
        token_run(tmp_path / "run", model, str(rows), "ddp", 1, 1, False, {"name": "full"})
    )
    part = estimate_activations(config, prepare(config))
    assert part.device == 0 and part.why.startswith("not estimated: ")
