"""Tests of k-shot subsets and folds: stratified by label, deterministic, and each row held out exactly once."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sklearn.model_selection import KFold, StratifiedKFold

from dist_ft.config.run import RunConfig
from dist_ft.data.read.chosen import choose, read_split
from dist_ft.data.read.sets import sets_of
from dist_ft.data.store.identity import split_folder
from dist_ft.errors import RequestError
from dist_ft.inspect.ledger import ledger_tables
from dist_ft.prepare import describe_data, prepare

LABELS = ["good", "bad", "good", "fair", "good", "bad", "fair", "good", "bad", "good", "fair", "good"] * 3
ROWS: list[dict[str, Any]] = [{"text": f"text {n}", "label": label} for n, label in enumerate(LABELS)]


@pytest.fixture
def make(tmp_path: Path, tiny_llama: Path) -> Any:
    def config_of(data: dict[str, Any], rows: list[dict[str, Any]] = ROWS, **changes: Any) -> RunConfig:
        path = tmp_path / "rows.jsonl"
        path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
        content: dict[str, Any] = {
            "run_name": "t",
            "output_dir": str(tmp_path / "run"),
            "model": {"dtype": "float32", "name_or_path": str(tiny_llama)},
            "task": {"name": "sequence_classification", "max_length": 32},
            "data": {"train": str(path), "cache_dir": str(tmp_path / "cache"), **data},
            "method": {"name": "full"},
            "engine": {"name": "ddp"},
            "optim": {},
            "train": {"global_batch_size": 2, "per_device_train_batch_size": 2},
            "track": {},
            "launch": {"name": "local", "workers_per_node": 1},
        }
        for group, keys in changes.items():
            content[group] = {**content[group], **keys}
        return RunConfig.model_validate(content)

    return config_of


def numbers(config: RunConfig, split: Any) -> list[int]:
    return [int(row["text"].split()[1]) for _, row in read_split(config, split)]


def test_k_shot_takes_as_many_of_each_label_in_the_order_of_the_file(make: Any) -> None:
    config = make({"k_shot": 4, "validation": "rows"})
    taken = numbers(config, "train")
    assert Counter(LABELS[n] for n in taken) == {"good": 4, "bad": 4, "fair": 4}
    assert taken == sorted(taken)
    assert numbers(make({"k_shot": 4, "subset_seed": 0}), "train") == taken  # train.seed is 0
    others = {tuple(numbers(make({"k_shot": 4, "subset_seed": seed}), "train")) for seed in range(1, 6)}
    assert len(others) == 5 and tuple(taken) not in others
    assert numbers(make({"k_shot": 4}, train={"seed": 3}), "train") == numbers(
        make({"k_shot": 4, "subset_seed": 3}), "train"
    )
    assert choose(config, "validation") is None and choose(make({}), "train") is None


def test_more_shots_keep_those_of_fewer(make: Any) -> None:
    """Subsets for increasing k are nested, as a learning curve over k needs."""
    few, more = (set(numbers(make({"k_shot": k}), "train")) for k in (2, 5))
    assert few < more


@pytest.mark.parametrize("folds", [2, 5])
def test_folds_hold_every_row_out_once_with_labels_alike(make: Any, folds: int) -> None:
    held = []
    for fold in range(folds):
        config = make({"folds": folds, "fold": fold, "subset_seed": 7})
        train, validation = numbers(config, "train"), numbers(config, "validation")
        assert sorted(train + validation) == list(range(36))
        counts = Counter(LABELS[n] for n in validation)
        for label, whole in Counter(LABELS).items():
            assert abs(counts[label] - whole / folds) < 1
        oracle = list(StratifiedKFold(folds, shuffle=True, random_state=7).split(np.zeros(36), LABELS))[fold]
        assert (train, validation) == (oracle[0].tolist(), oracle[1].tolist())
        held += validation
    assert sorted(held) == list(range(36))


def test_folds_take_every_seed_of_the_configuration(make: Any) -> None:
    """scikit-learn takes seeds of 32 bits only."""
    config = make({"folds": 2, "fold": 0, "subset_seed": 2**63 + 5})
    assert len(numbers(config, "train")) + len(numbers(config, "validation")) == 36


def test_folds_of_a_task_without_labels_are_plain_ones(make: Any) -> None:
    rows = [{"text": f"text {n}"} for n in range(10)]
    config = make({"folds": 3}, rows, task={"name": "masked_lm"})
    oracle = next(iter(KFold(3, shuffle=True, random_state=0).split(np.zeros(10))))
    assert numbers(config, "train") == oracle[0].tolist() and numbers(config, "validation") == oracle[1].tolist()


def test_shots_are_drawn_from_what_a_fold_leaves(make: Any) -> None:
    config = make({"folds": 3, "fold": 1, "k_shot": 2})
    train, validation = numbers(config, "train"), numbers(config, "validation")
    assert Counter(LABELS[n] for n in train) == {"good": 2, "bad": 2, "fair": 2}
    assert not set(train) & set(validation)
    assert validation == numbers(make({"folds": 3, "fold": 1}), "validation")


def test_the_run_learns_from_what_was_taken_and_says_so(make: Any) -> None:
    config = make({"k_shot": 2, "folds": 4})
    prepared = prepare(config)
    assert prepared.validation is not None
    assert prepared.train.ledger["rows_read"] == 6 and prepared.validation.ledger["rows_read"] == 9
    assert prepared.train.ledger["rows_of_source"] == 36
    assert prepared.train.ledger["chosen"] == "all but fold 0 of 4, 2 per label; seed 0"
    assert prepared.validation.ledger["chosen"] == "fold 0 of 4; seed 0"
    assert prepared.facts.labels == ("bad", "fair", "good") and prepared.facts.label_counts == (2, 2, 2)
    assert prepared.facts.rows == 6
    (table,) = ledger_tables(config, prepared.train, "train")
    assert "36" in list(table.columns[1].cells)
    folders = {
        split_folder(make(data), "train")
        for data in ({}, {"k_shot": 2}, {"k_shot": 3}, {"folds": 4}, {"folds": 4, "fold": 1}, {"folds": 5})
    }
    assert len(folders | {split_folder(make({"k_shot": 2, "subset_seed": 9}), "train")}) == 7
    assert split_folder(make({"k_shot": 2, "subset_seed": 0}), "train") in folders


def test_a_label_that_only_a_held_out_row_has_keeps_its_number(make: Any) -> None:
    rows = [*ROWS, {"text": "text 36", "label": "odd"}]
    with_it = next(f for f in range(3) if 36 in numbers(make({"folds": 3, "fold": f}, rows), "validation"))
    facts = prepare(make({"folds": 3, "fold": with_it}, rows)).facts
    assert facts.labels == ("bad", "fair", "good", "odd") and facts.label_counts[3] == 0


def test_rows_without_a_label_are_no_shots(make: Any) -> None:
    rows = [*ROWS, {"text": "text 36", "label": None}, {"text": "text 37", "label": -1}]
    assert max(numbers(make({"k_shot": 6}, rows), "train")) < 36


def test_too_few_rows_are_told(make: Any) -> None:
    with pytest.raises(
        RequestError, match=r"some labels have fewer than 10 training rows: bad has 9, fair has 9"
    ) as found:
        numbers(make({"k_shot": 10}), "train")
    assert "at most 9" in found.value.problems[0].way_out
    with pytest.raises(RequestError, match="cannot be split into 40 folds"):
        numbers(make({"folds": 40}), "validation")


def test_a_set_of_a_mixture_has_shots_of_its_own(make: Any, tmp_path: Path) -> None:
    source = str(tmp_path / "rows.jsonl")

    def mixed(**few: Any) -> RunConfig:
        sets = {"few": {"train": source, **few}, "all": {"train": source}}
        return make({"train": None, "mixture": sets, "subset_seed": 9})

    config, alone = mixed(k_shot=2), make({"k_shot": 2, "subset_seed": 9})
    prepared = prepare(config)
    assert prepared.train.sizes == {"all": 36, "few": 6}
    assert prepared.facts.label_counts == (9 + 2, 9 + 2, 18 + 2) and prepared.facts.rows == 42
    assert numbers(sets_of(config)["few"], "train") == numbers(alone, "train")
    assert split_folder(config, "train", "all") != split_folder(mixed(), "train", "all"), "label counts differ"
    with pytest.raises(RequestError) as found:
        prepare(mixed(k_shot=10))
    assert [problem.where for problem in found.value.problems] == ["data.mixture.few.k_shot"]


def test_a_share_of_the_rows_is_held_out(make: Any) -> None:
    config = make({"validation": "25%"})
    held, trained = numbers(config, "validation"), numbers(config, "train")
    assert len(held) == 9 and sorted(held + trained) == list(range(36))
    assert held == sorted(held) != list(range(9)) and held != list(range(27, 36))
    assert numbers(make({"validation": "25%", "subset_seed": 0}), "validation") == held  # train.seed is 0
    assert numbers(make({"validation": "25%", "subset_seed": 1}), "validation") != held
    assert len(numbers(make({"validation": "0.1%"}), "validation")) == 1
    with pytest.raises(RequestError, match="leaves none to train on"):
        numbers(make({"validation": "99%"}, ROWS[:2]), "train")


def test_a_share_of_a_set_of_a_mixture(make: Any) -> None:
    config = make({"validation": "25%"})
    path = config.data.train
    mixed = make({"train": None, "mixture": {"a": {"train": path, "validation": "25%"}, "b": {"train": path}}})
    assert set(sets_of(mixed, "validation")) == {"a"}
    alone = sets_of(mixed, "validation")["a"]
    assert numbers(alone, "validation") == numbers(config, "validation")
    assert numbers(alone, "train") == numbers(config, "train")


def test_held_out_rows_are_evaluated_and_not_trained(make: Any) -> None:
    prepared = prepare(make({"validation": "25%"}))
    assert prepared.train.ledger["rows_kept"] == 27 and prepared.train.ledger["rows_of_source"] == 36
    assert prepared.validation is not None and prepared.validation.ledger["rows_kept"] == 9
    assert prepared.validation.ledger["chosen"] == "25% of the training rows; seed 0"
    assert not set(prepared.train.digests().tolist()) & set(prepared.validation.digests().tolist())


def test_only_the_first_rows_are_read(make: Any) -> None:
    assert numbers(make({"max_rows": 5}), "train") == list(range(5))
    assert numbers(make({"max_rows": 100}), "train") == list(range(36))
    config = make({"max_rows": 8, "validation": "50%"})
    assert sorted(numbers(config, "train") + numbers(config, "validation")) == list(range(8))
    assert prepare(make({"max_rows": 5})).train.ledger["files"] == {config.data.train: 5}


REPEATED = [{**row, "id": n} for n, row in enumerate([*ROWS[:6], *ROWS[3:9], {"text": "text 0", "label": "bad"}])]


def test_repeated_rows_are_left_out(make: Any) -> None:
    """A row is repeated if all columns of its format are: `id` is none, and text 0 has another label."""
    config = make({"duplicates": "drop", "validation": "rows"}, REPEATED)
    assert numbers(config, "train") == [0, 1, 2, 3, 4, 5, 6, 7, 8, 0]
    ledger = prepare(make({"duplicates": "drop"}, REPEATED)).train.ledger
    assert (ledger["rows_of_source"], ledger["rows_read"], ledger["chosen"]) == (13, 10, "without 3 repeated")
    assert ledger["repeated"] == 1  # the same tokens with two labels
    held = make({"duplicates": "drop", "validation": "30%"}, REPEATED)
    assert sorted(numbers(held, "train") + numbers(held, "validation")) == [0, 0, 1, 2, 3, 4, 5, 6, 7, 8]


def test_keys_that_change_rows_change_the_prepared_split(make: Any) -> None:
    changes: list[dict[str, Any]] = [
        {"validation": "25%"},
        {"validation": "30%"},
        {"max_rows": 5},
        {"duplicates": "drop"},
        {"invalid_rows": "drop"},
        {"special_tokens_in_text": "keep"},
        {"delimiter": ";"},
        {},
    ]
    assert len({split_folder(make(data), "train").name for data in changes}) == len(changes)
    shared = [{"validation": share, "subset_seed": seed} for share in ("25%", "30%") for seed in (0, 1)]
    assert len({split_folder(make(data), "validation").name for data in shared}) == len(shared)


def test_labels_that_are_almost_the_same_are_told(make: Any) -> None:
    rows = [{"text": f"text {n}", "label": ("Good", "good", "bad")[n % 3]} for n in range(6)]
    config = make({}, rows)
    (line,) = describe_data(config, prepare(config))
    assert line == "labels that are almost the same are separate classes: 'Good' and 'good'"
    assert list(describe_data(make({}), prepare(make({})))) == []
    assert (
        list(describe_data(make({}), prepare(make({})), "train")) == []
    )  # training rows are not compared with themselves
