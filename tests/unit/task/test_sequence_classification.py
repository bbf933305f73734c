"""Sequence classification: the loss against transformers, and the metrics against scikit-learn."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import f1_score, matthews_corrcoef
from sklearn.utils.class_weight import compute_class_weight
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from dist_ft.config.run import RunConfig
from dist_ft.config.task import SequenceClassificationConfig
from dist_ft.data.read.faults import RowFault
from dist_ft.data.render.template import ChatTokenizer
from dist_ft.prepare import find_facts, prepare
from dist_ft.state import Facts, LossSum
from dist_ft.task.scores.classes import calibration_error
from dist_ft.task.sequence_classification import SequenceClassification
from dist_ft.testing.words import save_model
from tests.runs import labelled_run
from tests.samples import samples_of, write_labelled_rows

FACTS = Facts(labels=("calm", "glad", "cross"), label_counts=(6, 3, 1), rows=10, pad_id=0)


def task(facts: Facts = FACTS, **keys: Any) -> SequenceClassification:
    return SequenceClassification(SequenceClassificationConfig(name="sequence_classification", **keys), facts)


def segment(ids: list[int], *labels: int) -> dict[str, np.ndarray]:
    return {"input_ids": np.array(ids), "label": np.array(labels)}


ROWS = [[segment([1, 9, 8, 2], 0)], [segment([1, 7, 2], 2)], [segment([1, 11, 12, 13, 14, 2], 1)]]


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model("bert", tmp_path_factory.mktemp("bert"))


def load(folder: str, **overrides: Any) -> Any:
    torch.manual_seed(0)
    return AutoModelForSequenceClassification.from_pretrained(folder, num_labels=3, **overrides).eval()


def test_the_loss_is_transformers(bert: str) -> None:
    model = load(bert)
    batch = task().collate(samples_of(ROWS))
    expected = model(**batch.inputs, labels=batch.targets).loss
    result = task().loss(model, batch)
    torch.testing.assert_close(result.loss / result.weight, expected)
    assert batch.targets.tolist() == [0, 2, 1] and batch.tokens == 13


def test_weights_and_smoothing_are_torchs(bert: str) -> None:
    model = load(bert)
    subject = task(class_weights="balanced", label_smoothing=0.1)
    given = np.repeat([0, 1, 2], [6, 3, 1])
    balanced = torch.tensor(compute_class_weight("balanced", classes=np.arange(3), y=given), dtype=torch.float32)
    torch.testing.assert_close(subject.class_weights(), balanced)
    batch = subject.collate(samples_of(ROWS))
    result = subject.loss(model, batch)
    expected = torch.nn.functional.cross_entropy(
        model(**batch.inputs).logits, batch.targets, balanced, label_smoothing=0.1
    )
    torch.testing.assert_close(result.loss / result.weight, expected)
    assert batch.loss_weight == pytest.approx(float(balanced.sum()))
    assert task(class_weights=[1.0, 2.0, 3.0]).class_weights().tolist() == [1, 2, 3]


def test_several_labels_a_row(bert: str) -> None:
    model = load(bert, problem_type="multi_label_classification")
    subject = task(multi_label=True)
    batch = subject.collate(samples_of([[segment([1, 9, 2], 0, 2)], [segment([1, 7, 8, 2])]]))
    assert batch.targets.tolist() == [[1, 0, 1], [0, 0, 0]]
    result = subject.loss(model, batch)
    torch.testing.assert_close(result.loss / result.weight, model(**batch.inputs, labels=batch.targets).loss)
    scores = subject.score(model, batch)
    assert [row["label"] for row in scores.predictions] == [["calm", "cross"], []]
    assert set(subject.metrics(scores, ())) == {"loss", "accuracy", "f1", "f1_micro"}


def test_scores_are_scikit_learns() -> None:
    dice = np.random.default_rng(0)
    given, chosen = dice.integers(0, 3, 50), dice.integers(0, 3, 50)
    names = np.array(FACTS.labels)
    predictions = [
        {"sample": i, "label": names[g], "prediction": names[c], "probabilities": [0.2, 0.2, 0.6]}
        for i, (g, c) in enumerate(zip(given, chosen, strict=True))
    ]
    totals = LossSum(torch.tensor(25.0), torch.tensor(50.0), predictions=predictions)
    metrics = task().metrics(totals, ())
    assert metrics["loss"] == 0.5 and metrics["accuracy"] == pytest.approx((given == chosen).mean())
    assert metrics["f1"] == pytest.approx(f1_score(given, chosen, average="macro"))
    assert metrics["matthews_correlation"] == pytest.approx(matthews_corrcoef(given, chosen))
    details = task().details(totals, ())
    assert np.trace(details["confusion"]) == (given == chosen).sum()
    assert details["per_class"]["glad"]["support"] == (given == 1).sum()


def test_calibration_error_of_known_confidence() -> None:
    rows = [{"label": "a", "prediction": "a" if i < 8 else "b", "probabilities": [0.9, 0.1]} for i in range(10)]
    assert calibration_error(rows) == pytest.approx(0.1)  # confidence 90%, accuracy 80%
    assert calibration_error([*rows[:8]] * 2) == pytest.approx(0.1)  # confidence 90%, accuracy 100%


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": " ", "label": 0}, "the text is empty"),
        ({"text": "x", "label": None}, "the label is missing"),
        ({"text": "x", "label": "odd"}, "'odd' is not one of the labels"),
        ({"text": "x", "label": ["calm", "glad"]}, "the row has 2 labels"),
    ],
)
def test_rows_from_which_nothing_is_learned(bert: str, row: dict[str, Any], said: str) -> None:
    with pytest.raises(RowFault, match=said):
        task().encode(row, ChatTokenizer(AutoTokenizer.from_pretrained(bert)))


def test_pairs_and_truncation_keep_what_tells_texts_apart(bert: str) -> None:
    facts = Facts(labels=("no", "yes"), has_token_types=True)
    tokenizer = ChatTokenizer(AutoTokenizer.from_pretrained(bert))
    row = {"text": "w1 w2 w3 w4 w5", "text_pair": "w6", "label": "yes"}
    (whole,) = task(facts).encode(row, tokenizer)
    assert whole["token_type_ids"] == [0] * 7 + [1] * 2 and whole["label"] == [1]
    (cut,) = task(facts, max_length=7).truncate(row, tokenizer)
    assert len(cut["input_ids"]) == 7 and cut["input_ids"][-1] == 2 and cut["token_type_ids"][-2:] == [1, 1]


def test_labels_have_one_number_in_every_split(bert: str, tmp_path: Path) -> None:
    """The validation split has no row with one of the labels, and has others as text."""
    train, validation = tmp_path / "train.jsonl", tmp_path / "validation.jsonl"
    write_labelled_rows(train)
    rows = [{"text": "w1 w2", "label_text": "glad"}, {"text": "w3", "label": 2}, {"text": "مرحبا čaj", "label": 0}]
    validation.write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = labelled_run(tmp_path / "run", bert, train, "ddp", 1)
    given["data"] |= {"validation": str(validation)}
    prepared = prepare(RunConfig.model_validate(given))
    assert prepared.facts.labels == ("calm", "glad", "cross") and sum(prepared.facts.label_counts) == 37
    assert prepared.facts.has_token_types and prepared.facts.pad_id == 0
    assert prepared.validation is not None
    table = prepared.validation.open_table()
    assert [table.example(i)["label"].tolist() for i in range(3)] == [[1], [2], [0]]


def test_a_decoder_without_a_padding_token_pads_with_its_end(tmp_path: Path) -> None:
    folder = save_model("gpt2", tmp_path / "gpt2")
    write_labelled_rows(tmp_path / "rows.jsonl")
    config = RunConfig.model_validate(labelled_run(tmp_path / "run", folder, tmp_path / "rows.jsonl", "ddp", 1))
    facts = find_facts(config, lambda: ChatTokenizer(AutoTokenizer.from_pretrained(folder)))
    assert facts.pad_id == 5  # <eos>
    model = load(folder, pad_token_id=5)
    together = task(facts).collate(samples_of(ROWS))
    alone = [task(facts).collate(samples_of([row])) for row in ROWS]
    rows = torch.cat([model(**batch.inputs).logits for batch in alone])
    torch.testing.assert_close(model(**together.inputs).logits, rows)
