"""Token classification: label alignment and loss against transformers, and entity metrics against counts by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from dist_ft.config.run import RunConfig
from dist_ft.config.task import TokenClassificationConfig
from dist_ft.data.read.faults import InvalidRow, RowFault
from dist_ft.data.read.formats import detect, normalise
from dist_ft.data.store.encode import Sequences
from dist_ft.data.store.ledger import Ledger
from dist_ft.data.store.pack import in_groups
from dist_ft.data.store.table import TableWriter, TokenTable
from dist_ft.errors import RequestError
from dist_ft.inspect.rows import describe_sequence
from dist_ft.prepare import prepare
from dist_ft.state import Batch, Facts, Sample
from dist_ft.task.scores.entities import describe, measure
from dist_ft.task.token_classification import TokenClassification
from dist_ft.testing import tiny

NAMES = ("O", "B-loc", "B-per", "I-loc", "I-per")
ROWS: list[dict[str, Any]] = [
    {"tokens": ["Ada", "Lovelace", "lives", "in", "New", "York", "."], "tags": [2, 4, 0, 0, 1, 3, 0]},
    {"tokens": ["Åsa", "från", "Örebro", "😀", "東京"], "tags": ["B-per", "O", "B-loc", "O", "B-loc"]},
    {"tokens": ["زار", "محمد", "القاهرة", "\u200f", "أمس"], "tags": ["O", "B-per", "B-loc", "O", "O"]},
    {"tokens": ["", "unbelievable", "\u200b", "storm", " "], "tags": ["B-per", "O", "B-loc", "I-loc", "I-per"]},
]


@pytest.fixture(scope="module")
def wordpiece(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """BERT tokenizer with a vocabulary of letters and a few words, so that most words have several tokens."""
    from transformers import AutoTokenizer, BertTokenizerFast

    letters = sorted({letter for row in ROWS for word in row["tokens"] for letter in word.lower() if letter.strip()})
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "new", "##ork", "lives", "##able"]
    vocabulary = [*pieces, *letters, *(f"##{letter}" for letter in letters)]
    folder = tmp_path_factory.mktemp("wordpiece")
    (folder / "vocab.txt").write_text("\n".join(vocabulary), encoding="utf-8")
    BertTokenizerFast(vocab={word: i for i, word in enumerate(vocabulary)}).save_pretrained(folder)
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def bert(wordpiece: Any) -> Any:
    head = "AutoModelForTokenClassification"
    return tiny.build("bert", head, vocab_size=len(wordpiece), num_labels=len(NAMES)).eval()


def build(labels: Sequence[str] = NAMES, **keys: Any) -> TokenClassification:
    config = TokenClassificationConfig(name="token_classification", **keys)
    return TokenClassification(config, Facts(labels=tuple(labels), has_token_types=True))


def align(tokenizer: Any, words: list[str], tags: list[int], **options: Any) -> tuple[list[int], list[int]]:
    """Align labels as in `run_ner.py` of transformers: a token has the tag of its word if word_ids changes there."""
    encoded = tokenizer(words, is_split_into_words=True, **options)
    labels, previous = [], None
    for word in encoded.word_ids():
        labels.append(-100 if word is None or word == previous else tags[word])
        previous = word
    return encoded["input_ids"], labels


def numbers(row: dict[str, Any]) -> list[int]:
    return [tag if isinstance(tag, int) else NAMES.index(tag) for tag in row["tags"]]


def make_batch(task: TokenClassification, tokenizer: Any, folder: Path, rows: Sequence[dict[str, Any]] = ROWS) -> Batch:
    """Collate rows that are read from a table on disk, as in a run."""
    with TableWriter(folder, task.layout.columns, task.layout.row_columns) as writer:
        encoded = Sequences(task.layout)
        for row in rows:
            encoded.add(task.encode(row, SimpleNamespace(tokenizer=tokenizer)), Ledger())
        writer.extend(encoded.table())
    table = TokenTable.open(folder)
    samples = in_groups(table.lengths)
    batch = task.collate([Sample([table.example(*samples[i][0])], index=10 + i) for i in range(len(rows))])
    assert task.count_targets(table, samples).tolist() == batch.documents.bincount().tolist()
    return batch


@pytest.mark.parametrize("row", ROWS, ids=["int tags", "non-ASCII", "right to left", "words without a token"])
def test_labels_stand_on_first_pieces(row: dict[str, Any], wordpiece: Any) -> None:
    (example,) = build().encode(row, SimpleNamespace(tokenizer=wordpiece))
    ids, labels = align(wordpiece, row["tokens"], numbers(row))
    assert (example["input_ids"], example["labels"]) == (ids, labels)
    assert example["tags"] == numbers(row)
    assert [numbers(row)[word] for word in example["words"]] == [label for label in labels if label != -100]


def test_words_without_a_token_shift_no_label(wordpiece: Any) -> None:
    (example,) = build().encode(ROWS[3], SimpleNamespace(tokenizer=wordpiece))
    assert example["words"] == [1, 3]
    assert [label for label in example["labels"] if label != -100] == [NAMES.index("O"), NAMES.index("I-loc")]


def test_byte_level_words_get_their_space(tiny_tokenizer: Path) -> None:
    """Same as `run_ner.py`, which loads the tokenizers of GPT-2 and RoBERTa with add_prefix_space=True."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    given, spaced = (AutoTokenizer.from_pretrained(tiny_tokenizer) for _ in range(2))
    spaced.backend_tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    for row in ROWS[:3]:
        words = [word for word in row["tokens"] if word.strip()]
        for tokenizer in (given, spaced):
            (example,) = TokenClassification(build().config, Facts(labels=NAMES)).encode(
                {"tokens": words, "tags": numbers(row)[: len(words)]}, SimpleNamespace(tokenizer=tokenizer)
            )
            expected = align(spaced, words, numbers(row))
            assert (example["input_ids"], example["labels"]) == expected
    assert align(given, ["my", "bill"], [1, 2]) != align(spaced, ["my", "bill"], [1, 2])


def test_a_tokenizer_without_word_ids_is_refused(wordpiece: Any) -> None:
    with pytest.raises(RequestError, match="provides no word IDs"):
        build().encode(ROWS[0], SimpleNamespace(tokenizer=SimpleNamespace(is_fast=False)))


def test_truncated_words_count_as_outside(wordpiece: Any, bert: Any, tmp_path: Path) -> None:
    task = build(max_length=8, overlong="truncate")
    (example,) = task.truncate(ROWS[0], SimpleNamespace(tokenizer=wordpiece))
    options = {"truncation": True, "max_length": 8}
    assert (example["input_ids"], example["labels"]) == align(wordpiece, ROWS[0]["tokens"], numbers(ROWS[0]), **options)
    with TableWriter(tmp_path, task.layout.columns, task.layout.row_columns) as writer:
        encoded = Sequences(task.layout)
        encoded.add([example], Ledger())
        writer.extend(encoded.table())
    (prediction,) = task.score(bert, task.collate([Sample([TokenTable.open(tmp_path).example(0)], 0)])).predictions
    assert prediction["tags"] == [NAMES[tag] for tag in ROWS[0]["tags"]]
    assert len(example["words"]) < len(prediction["prediction"]) == 7
    assert set(prediction["prediction"][len(example["words"]) :]) == {"O"}


def test_loss_is_that_of_transformers(wordpiece: Any, bert: Any, tmp_path: Path) -> None:
    batch = make_batch(build(), wordpiece, tmp_path)
    aligned = [align(wordpiece, row["tokens"], numbers(row)) for row in ROWS]
    longest = max(len(ids) for ids, _ in aligned)
    ids = torch.tensor([ids + [wordpiece.pad_token_id] * (longest - len(ids)) for ids, _ in aligned])
    labels = torch.tensor([labels + [-100] * (longest - len(labels)) for _, labels in aligned])
    assert torch.equal(batch.inputs["input_ids"], ids)
    with torch.no_grad():
        expected = bert(input_ids=ids, attention_mask=(ids != wordpiece.pad_token_id).long(), labels=labels).loss
        found = build().loss(bert, batch)
    assert float(found.weight) == int((labels != -100).sum()) == batch.supervised
    torch.testing.assert_close(found.loss / found.weight, expected)


def test_label_smoothing_is_that_of_the_trainer(wordpiece: Any, bert: Any, tmp_path: Path) -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    batch = make_batch(build(), wordpiece, tmp_path)
    labels = torch.full(batch.inputs["input_ids"].shape, -100)
    labels.view(-1)[batch.positions] = batch.targets
    with torch.no_grad():
        expected = LabelSmoother(epsilon=0.1)(bert(**batch.inputs), labels)
        found = build(label_smoothing=0.1).loss(bert, batch)
    torch.testing.assert_close(found.loss / found.weight, expected)


def test_predictions_are_the_same_alone_and_together(wordpiece: Any, bert: Any, tmp_path: Path) -> None:
    def score(name: str, rows: list[dict[str, Any]]) -> list[Any]:
        (tmp_path / name).mkdir()
        with torch.no_grad():
            return list(build().score(bert, make_batch(build(), wordpiece, tmp_path / name, rows)).predictions)

    together = score("all", ROWS)
    alone = [score(str(i), [row])[0] for i, row in enumerate(ROWS)]
    assert [row["prediction"] for row in together] == [row["prediction"] for row in alone]
    assert [row["sample"] for row in together] == [10, 11, 12, 13]
    assert [row["tags"] for row in together] == [[NAMES[n] for n in numbers(row)] for row in ROWS]
    assert any(tag != "O" for row in together for tag in row["prediction"])  # the predictions are not trivial
    batch = make_batch(build(), wordpiece, tmp_path).without_targets()
    assert build().score(bert, batch).predictions == []


def test_entities_are_counted_by_hand() -> None:
    predictions = [
        {  # the first entity is correct, the second one has a wrong end
            "tags": ["B-per", "I-per", "O", "B-loc", "I-loc"],
            "prediction": ["B-per", "I-per", "O", "B-loc", "O"],
        },
        {"tags": ["B-per", "B-per", "O"], "prediction": ["B-per", "I-per", "I-loc"]},  # two merged; I-loc starts one
        {"tags": ["O", "B-loc"], "prediction": ["O", "B-loc"]},
    ]
    found = measure(predictions, NAMES)
    right, guessed, given = 2, 5, 5
    assert found["precision"] == pytest.approx(right / guessed)
    assert found["recall"] == pytest.approx(right / given)
    assert found["f1"] == pytest.approx(2 * right / (guessed + given))
    assert found["accuracy"] == pytest.approx(7 / 10)
    assert describe(predictions, NAMES) == {
        "per_class": {
            "loc": {"precision": 1 / 3, "recall": 1 / 2, "f1": pytest.approx(2 / 5), "support": 2},
            "per": {"precision": 1 / 2, "recall": 1 / 3, "f1": pytest.approx(2 / 5), "support": 3},
        }
    }


def test_a_split_without_entities_scores_zero() -> None:
    predictions = [{"tags": ["O", "O"], "prediction": ["O", "O"]}]
    assert measure(predictions, NAMES) == {"accuracy": 1.0, "precision": 0.0, "recall": 0.0, "f1": 0.0}
    assert [row["support"] for row in describe(predictions, NAMES)["per_class"].values()] == [0, 0]


def test_parts_of_speech_have_no_entities() -> None:
    predictions = [{"tags": ["NOUN", "VERB", "NOUN"], "prediction": ["NOUN", "NOUN", "NOUN"]}]
    found = measure(predictions, ("NOUN", "VERB"))
    assert found == {"accuracy": pytest.approx(2 / 3), "f1": pytest.approx((0.8 + 0) / 2)}
    assert describe(predictions, ("NOUN", "VERB"))["per_class"]["NOUN"]["recall"] == 1.0


def test_only_tags_that_are_given_become_labels() -> None:
    row = {"tokens": list("abcdef"), "tags": [3, None, -1, -100, "", 3]}
    assert list(TokenClassification.labels_of(row)) == [(3, None), (3, None)]


@pytest.mark.parametrize("column", ["ner_tags", "tags", "labels"])
def test_format_tagged(column: str) -> None:
    row = {"id": "0", "tokens": ["a", "b"], column: ["O", "B-loc"]}
    assert detect(row, task="token_classification") == "tagged"
    assert normalise(row, "auto", {}) == {"tokens": ["a", "b"], "tags": ["O", "B-loc"]}


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ({"tokens": ["a", "b"], "tags": [0]}, "2 tokens but 1 tags"),
        ({"tokens": "a b", "tags": [0, 0]}, "not a list of strings"),
        ({"tokens": ["a"], "tags": "O"}, "the tags are not a list"),
        ({"tokens": ["a"], "tags": [0.5]}, "neither an integer nor a string"),
    ],
)
def test_rows_of_another_shape_are_refused(row: dict[str, Any], says: str) -> None:
    with pytest.raises(InvalidRow, match=says):
        normalise(row, "tagged", {})


@pytest.mark.parametrize(
    ("row", "cause"),
    [
        ({"tokens": [], "tags": []}, "no words"),
        ({"tokens": ["", "\u200b"], "tags": [0, 0]}, "no word has a token"),
        ({"tokens": ["a"], "tags": [None]}, "label is missing"),
        ({"tokens": ["a"], "tags": ["B-film"]}, "not one of the labels"),
        ({"tokens": ["a"], "tags": [-100]}, "not one of the labels"),
    ],
)
def test_rows_with_nothing_to_learn_are_faults(row: dict[str, Any], cause: str, wordpiece: Any) -> None:
    with pytest.raises(RowFault, match=cause):
        build().encode(row, SimpleNamespace(tokenizer=wordpiece))


def test_prepared_rows_are_counted_by_what_became_of_them(tiny_llama: Path, tmp_path: Path) -> None:
    """`O` has index 0, rows with empty lists are dropped and counted, and long rows are truncated."""
    rows = [
        {"tokens": ["my", "bill"], "ner_tags": ["B-x", "O"]},
        {"tokens": [], "ner_tags": []},
        {"tokens": ["القاهرة"] * 9, "ner_tags": ["A-y"] * 9},
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    keys = {"max_length": 16, "overlong": "truncate", "unsupervised": "drop"}
    content: dict[str, Any] = {
        "run_name": "t",
        "output_dir": str(tmp_path / "run"),
        "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
        "task": {"name": "token_classification", **keys},
        "data": {"train": str(source), "validation": str(source), "cache_dir": str(tmp_path / "cache")},
        "method": {"name": "full"},
        "engine": {"name": "ddp"},
        "optim": {},
        "train": {"global_batch_size": 1, "per_device_train_batch_size": 1},
        "track": {},
        "launch": {"name": "local", "workers_per_node": 1},
    }
    prepared = prepare(RunConfig.model_validate(content))
    assert prepared.facts.labels == ("O", "A-y", "B-x")
    assert prepared.facts.label_counts == (1, 9, 1)
    ledger = prepared.train.ledger
    assert (ledger["rows_read"], ledger["rows_kept"]) == (3, 2)
    assert ledger["dropped"]["the row has no words"]["rows"] == 1
    assert prepared.validation is not None
    example = prepared.validation.open_table().example(1)
    assert len(example["input_ids"]) == 16 and example["tags"].tolist() == [1] * 9
    assert 0 < len(example["words"]) < 9


def test_view_tells_the_words_tags() -> None:
    sequence = {"input_ids": [5, 6, 7], "labels": [2, -100, 0], "tags": [2, 0], "words": [0, 1]}
    assert describe_sequence(sequence, Facts(labels=NAMES)) == "3 tokens, B-per O"
