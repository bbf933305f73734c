"""Losses and scores of a mixture's sets: those of each set alone, which add up to the whole."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from dist_ft.config.task import (
    CausalLMConfig,
    InstructionConfig,
    MaskedLMConfig,
    QuestionAnsweringConfig,
    Seq2SeqConfig,
    SequenceClassificationConfig,
    TokenClassificationConfig,
)
from dist_ft.data.order.loader import evaluation_batches, split_batches
from dist_ft.data.store.pack import Samples, in_groups, pack_in_order
from dist_ft.data.store.table import TokenTable
from dist_ft.loop import is_better
from dist_ft.process.sums import Sums, losses_of_parts
from dist_ft.state import Batch, Facts, LossSum, Sample
from dist_ft.task.by_set import LossBySet, ScoreBySet
from dist_ft.task.causal_lm import CausalLM
from dist_ft.task.instruction import Instruction
from dist_ft.task.masked_lm import MaskedLM
from dist_ft.task.question_answering import QuestionAnswering
from dist_ft.task.seq2seq import Seq2Seq
from dist_ft.task.sequence_classification import SequenceClassification
from dist_ft.task.token_classification import TokenClassification

SIZES = {"one": 5, "two": 4, "three": 3}
DICE = np.random.default_rng(0)
ROWS = [
    {"input_ids": DICE.integers(3, 500, n).tolist(), "labels": [-100, *DICE.integers(3, 500, n - 1).tolist()]}
    for n in DICE.integers(4, 20, 12).tolist()
]
TABLE = TokenTable.of(ROWS)
ENDS = {"one": range(5), "two": range(5, 9), "three": range(9, 12)}


class Joined:
    """What is read of a split of several sets."""

    def __init__(self, sizes: dict[str, int] = SIZES) -> None:
        self.sizes = sizes

    def open_table(self) -> TokenTable:
        return TABLE

    def open_samples(self) -> Samples:
        return in_groups(TABLE.lengths)


def split_of(sizes: dict[str, int]) -> Any:
    return Joined(sizes)


JOINED = split_of(SIZES)


@pytest.fixture(scope="module")
def model(tiny_llama: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(tiny_llama, attn_implementation="eager").eval()


def task_of(padding_free: bool) -> Instruction:
    config = InstructionConfig.model_validate({"name": "instruction", "max_length": 64})
    return Instruction(config, padding_free=padding_free)


def batch_of(task: Any, indices: list[int]) -> Batch:
    return task.collate([Sample([TABLE.example(n)], n) for n in indices])


@torch.no_grad()
def test_losses_of_sets_are_those_of_each_alone_and_add_up(model: Any) -> None:
    task = task_of(False)
    told, sums = LossBySet(task, JOINED.sizes), Sums()
    chosen = [[0, 7, 3, 8], [5, 1, 2, 6], [4, 4]]  # nothing of `three`; a sample twice
    for micro in chosen:
        sums.add(told.loss(model, batch_of(task, micro)))
    empty = batch_of(task, [11]).without_targets()
    sums.add(told.loss(model, empty))
    totals = sums.total()
    found = losses_of_parts(totals)
    assert list(found) == ["loss/one", "loss/two"]
    weight = loss = 0.0
    for name in ("one", "two"):
        own = [n for micro in chosen for n in micro if n in ENDS[name]]
        alone = [task.loss(model, batch_of(task, [n])) for n in own]  # row by row, without other rows beside it
        expected = sum(float(a.loss) for a in alone) / sum(float(a.weight) for a in alone)
        assert found[f"loss/{name}"] == pytest.approx(expected, rel=1e-5)
        weight += sum(float(a.weight) for a in alone)
        loss += float(totals.counts[f"loss@{name}"])
    assert loss == pytest.approx(float(totals.loss), rel=1e-6) and weight == float(totals.weight)
    assert float(totals.counts["weight@three"]) == 0


@torch.no_grad()
def test_packed_documents_are_told_by_their_samples(model: Any) -> None:
    samples = pack_in_order(TABLE.lengths[:9], 40)
    sizes = {"first": 2, "second": len(samples) - 2}
    told = LossBySet(task_of(True), sizes)
    segments = [[TABLE.example(*segment) for segment in samples[n]] for n in range(len(samples))]
    batch = told.collate([Sample(parts, n) for n, parts in enumerate(segments)])
    logits = torch.randn(1, int(batch.inputs["input_ids"].shape[1]), 512, generator=torch.manual_seed(1))

    def fake(logits_to_keep: torch.Tensor, **inputs: Any) -> Any:
        return type("Output", (), {"logits": logits[:, logits_to_keep]})

    result = told.loss(fake, batch)  # type: ignore[arg-type]
    rows = sum(len(samples[n]) for n in range(2))
    here = batch.documents < rows
    expected = torch.nn.functional.cross_entropy(logits[0, batch.positions[here]], batch.targets[here], reduction="sum")
    assert float(result.counts["loss@first"]) == pytest.approx(float(expected), rel=1e-6)
    assert float(result.counts["weight@first"]) == int(here.sum())


@torch.no_grad()
def test_scores_of_sets_are_those_of_each_alone(model: Any) -> None:
    task: Any = task_of(False)
    told: Any = ScoreBySet(task, JOINED.sizes)
    ranks = []
    for rank in range(2):  # a rank without a sample of a set still has its names
        sums = Sums()
        for batch in split_batches(JOINED, task.collate, rank=rank, world=2, per_device=4):
            sums.add(told.score(model, batch))
        ranks.append(sums.sums)
    assert ranks[0].keys() == ranks[1].keys()
    both = {name: ranks[0][name] + ranks[1][name] for name in ranks[0]}
    found = told.metrics(LossSum(both.pop("loss"), both.pop("weight"), both), ())
    for name, among in {"": range(12), **ENDS}.items():
        sums = Sums()
        for n in among:
            sums.add(task.score(model, batch_of(task, [n])))
        alone = task.metrics(sums.total(), ())
        for key, value in alone.items():
            assert found[f"{key}/{name}" if name else key] == pytest.approx(value, rel=1e-5), (name, key)


def test_predictions_name_their_set() -> None:
    class Telling:
        def score(self, model: Any, batch: Batch) -> LossSum:
            said = [{"sample": n, "prediction": "x"} for n in batch.samples]
            return LossSum(torch.zeros(()), torch.ones(()), predictions=said)

    plain, told = (Telling(), ScoreBySet(Telling(), JOINED.sizes))  # type: ignore[arg-type]
    task, found = task_of(False), {}
    for batch in split_batches(JOINED, task.collate, rank=0, world=1, per_device=4):
        assert "set" not in plain.score(None, batch).predictions[0]
        found |= {p["sample"]: p["set"] for p in told.score(None, batch).predictions}  # type: ignore[arg-type]
    assert found == {n: name for name, own in ENDS.items() for n in own}


@torch.no_grad()
def test_without_sets_nothing_changes(model: Any) -> None:
    task = task_of(False)
    assert losses_of_parts(task.loss(model, batch_of(task, [0, 1]))) == {}

    split = list(split_batches(split_of({}), task.collate, rank=0, world=1, per_device=4))
    whole = list(evaluation_batches(TABLE, in_groups(TABLE.lengths), task.collate, rank=0, world=1, per_device=4))
    assert [b.samples for b in split] == [b.samples for b in whole]


FACTS = Facts(labels=("a", "b", "c"), label_counts=(5, 2, 1), rows=8, mask_id=1, vocabulary=512)
BASIC = {"max_length": 16}
TASKS: dict[str, Any] = {
    "causal_lm": CausalLM(CausalLMConfig.model_validate({"name": "causal_lm", **BASIC}), padding_free=False),
    "masked_lm": MaskedLM(MaskedLMConfig.model_validate({"name": "masked_lm", **BASIC}), FACTS),
    "seq2seq": Seq2Seq(
        Seq2SeqConfig.model_validate({"name": "seq2seq", "label_smoothing": 0.1, **BASIC}), FACTS, padding_free=False
    ),
    "token_classification": TokenClassification(
        TokenClassificationConfig.model_validate({"name": "token_classification", "label_smoothing": 0.1, **BASIC}),
        FACTS,
    ),
    **{
        f"sequence_classification {sorted(keys)}": SequenceClassification(
            SequenceClassificationConfig.model_validate({"name": "sequence_classification", **keys, **BASIC}), FACTS
        )
        for keys in ({}, {"class_weights": "balanced", "label_smoothing": 0.2}, {"multi_label": True})
    },
}


@pytest.mark.parametrize("name", TASKS)
def test_losses_of_targets_add_up_in_every_task(name: str) -> None:
    """The tasks' sums are held against transformers and torch in their own tests."""
    task = TASKS[name]
    several = "multi_label" in name
    torch.manual_seed(0)
    logits = torch.randn(2, 6, 3) if "classification" in name else torch.randn(2, 6, 512)
    if "sequence" in name:
        logits = logits[:, 0]
    targets = torch.tensor([[1.0, 0, 1], [0, 0, 1]]) if several else torch.tensor([2, 0])
    spots = torch.arange(2)
    weight = None
    if "sequence" in name:
        weights = task.class_weights()
        weight = 6.0 if several else 2.0 if weights is None else float(weights[targets].sum())
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6)}
    batch = Batch(inputs, targets, spots, spots, 6, (0, 1), weight)
    result = task.loss(lambda **inputs: type("Output", (), {"logits": logits}), batch)
    assert result.losses is not None and result.losses.shape == (2,)
    assert float(result.losses.sum()) == pytest.approx(float(result.loss), rel=1e-6)
    given = torch.ones(2) if result.weights is None else result.weights
    assert float(given.sum()) == pytest.approx(float(result.weight), rel=1e-6)


def test_losses_of_questions_add_up() -> None:
    config = QuestionAnsweringConfig.model_validate({"name": "question_answering", "max_length": 64})
    task: Any = QuestionAnswering(config, FACTS)
    starts, ends = torch.randn(2, 6, generator=torch.manual_seed(0)), torch.randn(2, 6)
    inputs = {"input_ids": torch.zeros(2, 6, dtype=torch.int64), "attention_mask": torch.ones(2, 6)}
    batch = Batch(inputs, torch.tensor([[1, 3], [0, 0]]), torch.arange(2), torch.arange(2), 12, (0, 1))
    result = task.loss(lambda **inputs: SimpleNamespace(start_logits=starts, end_logits=ends), batch)
    first = (torch.nn.functional.cross_entropy(starts[:1], torch.tensor([1]))
             + torch.nn.functional.cross_entropy(ends[:1], torch.tensor([3]))) / 2  # fmt: skip
    assert float(result.losses[0]) == pytest.approx(float(first), rel=1e-6)
    assert float(result.losses.sum()) == pytest.approx(float(result.loss), rel=1e-6)


def test_the_best_step_may_be_that_of_one_set() -> None:
    assert is_better(1.0, 2.0, "loss/one") and not is_better(1.0, 2.0, "accuracy/one")


def test_names_are_json(tmp_path: Path) -> None:
    counts = {"loss@a": torch.tensor(3.0).double(), "weight@a": torch.tensor(2.0).double()}
    assert json.dumps(losses_of_parts(LossSum(torch.tensor(3.0), torch.tensor(2.0), counts))) == '{"loss/a": 1.5}'
