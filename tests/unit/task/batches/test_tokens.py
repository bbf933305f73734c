"""The next-token prediction loss does not depend on the layout and equals that of a plain reference implementation."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import AutoModelForCausalLM

from dist_ft.config.task import CausalLMConfig, InstructionConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.state import LossSum
from dist_ft.task.causal_lm import CausalLM
from dist_ft.task.instruction import Instruction
from tests.samples import samples_of


def segment(ids: list[int], labels: list[int]) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids, dtype=np.int32), "labels": np.array(labels, dtype=np.int32)}


SEGMENTS = [
    segment([5, 6, 7, 8], [-100, -100, 7, 8]),
    segment([9, 10, 11], [9, 10, -100]),
    segment([12, 13, 14, 15, 16], [-100, 13, -100, 15, 16]),
]
UNPACKED = samples_of([[s] for s in SEGMENTS])
PACKED = samples_of([SEGMENTS[:2], SEGMENTS[2:]])


def task(padding_free: bool) -> Instruction:
    return Instruction(InstructionConfig(name="instruction"), padding_free=padding_free)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> nn.Module:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").train()


@pytest.fixture(scope="module")
def documents_model(tiny_llama: Path) -> nn.Module:
    from dist_ft.model.attention import documents

    documents.register()
    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="documents_eager").train()


def oracle(model: nn.Module) -> tuple[torch.Tensor, int]:
    """Sum of losses and number of targets, one target at a time, without using the code under test."""
    losses = []
    for s in SEGMENTS:
        ids, labels = torch.tensor(s["input_ids"])[None].long(), s["labels"].tolist()
        logits = model(input_ids=ids).logits[0]
        predictions = functional.log_softmax(logits, dim=-1)
        losses += [-predictions[t - 1, labels[t]] for t in range(1, len(labels)) if labels[t] != -100]
    return torch.stack(losses).sum(), len(losses)


def gradients(model: nn.Module, loss: torch.Tensor) -> list[torch.Tensor]:
    return list(torch.autograd.grad(loss, list(model.parameters())))


def test_the_shift_stays_inside_a_segment() -> None:
    batch = task(True).collate(PACKED)
    assert batch.inputs["input_ids"].tolist() == [[5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15, 16]]
    assert batch.inputs["position_ids"].tolist() == [[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 3, 4]]
    assert batch.inputs["document_lengths"] == (4, 3, 5)
    assert batch.targets.tolist() == [7, 8, 10, 13, 15, 16]
    assert batch.positions.tolist() == [1, 2, 4, 7, 9, 10]
    assert batch.documents.tolist() == [0, 0, 1, 2, 2, 2]
    assert (batch.tokens, batch.supervised) == (12, 6)


def test_padded_rows_have_the_same_targets() -> None:
    batch, free = task(False).collate(UNPACKED), task(True).collate(UNPACKED)
    assert batch.inputs["attention_mask"].sum(dim=1).tolist() == [4, 3, 5]
    assert batch.inputs["input_ids"].shape == (3, 5)
    assert batch.targets.tolist() == free.targets.tolist()
    assert batch.documents.tolist() == free.documents.tolist()
    before = batch.inputs["input_ids"].view(-1)[batch.positions]
    assert before.tolist() == free.inputs["input_ids"].view(-1)[free.positions].tolist()
    assert (batch.tokens, batch.squared_lengths) == (free.tokens, free.squared_lengths) == (12, 50)


def test_packed_samples_cannot_be_padded() -> None:
    with pytest.raises(AssertionError, match="padding-free"):
        task(False).collate(PACKED)


@pytest.mark.parametrize("layout", ["padded", "documents", "packed"])
def test_loss_and_gradient_do_not_depend_on_the_layout(
    layout: str, model: nn.Module, documents_model: nn.Module
) -> None:
    subject = task(layout != "padded")
    used = model if layout == "padded" else documents_model
    result = subject.loss(used, subject.collate(PACKED if layout == "packed" else UNPACKED))
    total, count = oracle(model)
    assert float(result.weight) == count == 6
    assert result.loss.item() == pytest.approx(total.item(), rel=1e-6)
    for got, expected in zip(gradients(used, result.loss), gradients(model, total), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("padding_free", [True, False])
def test_a_micro_batch_without_targets_gives_zero_and_zero_gradients(
    padding_free: bool, model: nn.Module, documents_model: nn.Module
) -> None:
    used = documents_model if padding_free else model
    used.zero_grad()
    subject = task(padding_free)
    result = subject.loss(used, subject.collate(samples_of([[segment([1, 2, 3], [-100] * 3)]])))
    assert (result.loss.item(), result.weight.item()) == (0.0, 0.0)
    result.loss.backward()
    assert all(p.grad is not None and float(p.grad.abs().sum()) == 0.0 for p in used.parameters())
    scores = subject.score(used, subject.collate(samples_of([[segment([1, 2, 3], [-100] * 3)]])))
    assert {name: int(value) for name, value in scores.counts.items()} == {
        "correct_tokens": 0,
        "exact_rows": 0,
        "rows": 0,
    }


class Fixed(nn.Module):
    """Model that predicts `answers[token]` after each token."""

    def __init__(self, answers: dict[int, int]) -> None:
        super().__init__()
        self.answers = answers

    def forward(self, input_ids: torch.Tensor, logits_to_keep: Any = None, **kwargs: Any) -> Any:
        logits = functional.one_hot(input_ids.apply_(lambda t: self.answers.get(t, 0)), 20).float() * 50
        return SimpleNamespace(logits=logits if logits_to_keep is None else logits[:, logits_to_keep])


@pytest.mark.parametrize("padding_free", [True, False])
def test_scores_count_right_tokens_and_rows_that_are_right_throughout(padding_free: bool) -> None:
    # correct for 6→7, 7→8 and 9→10; in the third document for 12→13 and 14→15, but not for 15→16
    subject, fixed = task(padding_free), Fixed({6: 7, 7: 8, 9: 10, 12: 13, 14: 15, 15: 0})
    scores = subject.score(fixed, subject.collate(UNPACKED))
    assert {name: int(value) for name, value in scores.counts.items()} == {
        "correct_tokens": 5,
        "exact_rows": 2,
        "rows": 3,
    }
    assert float(scores.loss) == pytest.approx(50.0, abs=1e-3)
    metrics = subject.metrics(scores, ())
    assert metrics == pytest.approx(
        {"loss": 50 / 6, "perplexity": math.exp(50 / 6), "token_accuracy": 5 / 6, "exact_match": 2 / 3}, rel=1e-4
    )


def test_teacher_forced_exactness_is_what_greedy_decoding_gives(model: nn.Module) -> None:
    prompt = [40, 41, 42]
    model.eval()
    with torch.no_grad():
        answer = model.generate(
            torch.tensor([prompt]), max_new_tokens=5, do_sample=False, eos_token_id=511, pad_token_id=0
        )[0, 3:].tolist()
        subject = task(False)
        exact = []
        for wanted in (answer, [*answer[:-1], (answer[-1] + 1) % 512]):
            batch = subject.collate(samples_of([[segment(prompt + wanted, [-100] * 3 + wanted)]]))
            exact.append(int(subject.score(model, batch).counts["exact_rows"]))
    model.train()
    assert exact == [1, 0]


def test_causal_metrics_have_no_exact_match() -> None:
    counts = {"correct_tokens": torch.tensor(3), "exact_rows": torch.tensor(0), "rows": torch.tensor(1)}
    totals = LossSum(torch.tensor(8.0), torch.tensor(4.0), counts)
    subject = CausalLM(CausalLMConfig(name="causal_lm"), padding_free=True)
    assert subject.metrics(totals, ()) == pytest.approx({"loss": 2.0, "perplexity": math.e**2, "token_accuracy": 0.75})


class Recorder:
    """Stub of `ChatTokenizer` that records calls."""

    def __getattr__(self, name: str) -> Callable[..., Any]:
        return lambda *arguments: {"input_ids": [name, *arguments], "labels": [0, 1]}


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "a", "completion": "b"}, ["encode_pair", "a", "b"]),
        ({"messages": ["m"]}, ["encode_messages", ["m"], None, 0]),
        ({"messages": ["m"], "tools": ["t"], "context": 2}, ["encode_messages", ["m"], ["t"], 2]),
        ({"input_ids": [1, 2], "labels": [-100, 2]}, [1, 2]),
    ],
)
def test_rows_reach_the_tokenizer_by_their_shape(row: dict[str, Any], expected: list[Any]) -> None:
    assert task(True).encode(row, Recorder())[0]["input_ids"] == expected


def test_text_rows_reach_the_tokenizer() -> None:
    subject = CausalLM(CausalLMConfig(name="causal_lm"), padding_free=True)
    assert subject.encode({"text": "x"}, Recorder())[0]["input_ids"] == ["encode_text", "x"]
    assert subject.encode({"input_ids": [1, 2], "labels": [1, 2]}, None) == [{"input_ids": [1, 2], "labels": [1, 2]}]
    with pytest.raises(RowFault, match="no token after the first one is supervised"):
        subject.encode({"input_ids": [1, 2], "labels": [1, -100]}, None)
