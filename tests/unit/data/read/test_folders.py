"""Which files of a folder or a glob belong to a split; `datasets` resolves the same folders as a reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.data.read.folders import describe_left_out, split_of
from dist_ft.data.read.rows import read_rows
from dist_ft.data.read.sources import fingerprint, resolve, survey
from dist_ft.errors import RequestError


def write(folder: Path, *names: str) -> Path:
    """Write files of one row each, which says the name of its file."""
    import pyarrow
    import pyarrow.parquet

    for name in names:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pyarrow.parquet.write_table(pyarrow.table({"text": [name]}), path)
        else:
            path.write_text(json.dumps({"text": name}) + "\n")
    return folder


def read(source: Any, split: str = "train") -> list[str]:
    return [row["text"] for _, row in read_rows(str(source), split=split)]


HUB = [
    ["train-00000-of-00002.parquet", "train-00001-of-00002.parquet", "validation-0.parquet", "test-0.parquet"],
    ["squad_train.jsonl", "squad_dev.jsonl", "squad_test.jsonl"],
    ["my-data.train.jsonl", "my-data.valid.jsonl", "my-data.test.jsonl"],
    ["train/a.jsonl", "train/b.jsonl", "validation/a.jsonl", "test/a.jsonl"],
    ["data/train-00000-of-00001.parquet", "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
]


@pytest.mark.parametrize("names", HUB, ids=lambda names: names[0])
def test_splits_are_those_that_datasets_finds(tmp_path: Path, names: list[str]) -> None:
    import datasets

    folder = write(tmp_path / "set", *names)
    expected = datasets.load_dataset(str(folder), cache_dir=str(tmp_path / "cache"))
    assert set(expected) == {"train", "validation", "test"}
    for split, rows in expected.items():
        assert sorted(read(folder, split)) == sorted(rows["text"]) and len(rows) > 0
        left = survey(str(folder), split).left_out
        assert sum(map(len, left.values())) == len(names) - len(rows)
        assert all(reason.startswith("split ") for reason in left)


def test_a_glob_gives_the_rows_of_a_split_unless_it_says_the_split_itself(tmp_path: Path) -> None:
    folder = write(tmp_path, *HUB[0])
    glob = folder / "*.parquet"
    assert read(glob) == HUB[0][:2]
    assert read(glob, "test") == ["test-0.parquet"]
    assert read(folder / "test-*.parquet") == ["test-0.parquet"]  # asked for by name
    assert read(folder / "test-0.parquet") == ["test-0.parquet"]
    write(tmp_path / "deep", "train/a.jsonl", "test/a.jsonl")
    assert read(tmp_path / "deep" / "**" / "*.jsonl") == ["train/a.jsonl"]
    assert read(tmp_path / "deep" / "test" / "*.jsonl") == ["test/a.jsonl"]


@pytest.mark.parametrize(
    ("names", "split", "said"),
    [
        (["test.jsonl", "test-2.jsonl"], "train", "contains no train rows (test: test-2.jsonl, test.jsonl)"),
        (["train.jsonl"], "validation", "contains no validation rows (train: train.jsonl)"),
        (["train.jsonl", "extra.jsonl"], "train", "those of others do not (extra.jsonl)"),
        (["testset.jsonl", "trainset.jsonl", "more.csv"], "train", "those of others do not (more.csv)"),
        (["train_test.jsonl"], "train", "the words of several splits (train, test)"),
        (["a/train.jsonl", "b/train.jsonl"], "train", "contains no data file, only its subfolders do"),
        (["README.txt", "x.bin"], "train", "contains no data file"),
    ],
)
def test_what_cannot_be_told_is_refused(tmp_path: Path, names: list[str], split: str, said: str) -> None:
    with pytest.raises(RequestError) as caught:
        resolve(str(write(tmp_path, *names)), split)
    assert said in caught.value.problems[0].rule and caught.value.problems[0].way_out


def test_what_is_no_data_is_left_out_and_said(tmp_path: Path) -> None:
    names = ["a.jsonl", "b.jsonl", "README.txt", "LICENSE.txt", "dataset_info.json", "notes.docx", "sub/c.jsonl"]
    found = survey(str(write(tmp_path, *names, ".hidden.jsonl", "sub/.cache/d.jsonl", "test/.cache/e.jsonl")))
    assert [path.name for path in found.read if isinstance(path, Path)] == ["a.jsonl", "b.jsonl"]
    assert describe_left_out(found.left_out) == (
        "2 files (documentation): LICENSE.txt, README.txt; 1 file (metadata): dataset_info.json; "
        "1 file (not a data format): notes.docx; 1 file (in a subfolder): c.jsonl"
    )
    assert read(tmp_path) == ["a.jsonl", "b.jsonl"]
    assert read(tmp_path / "*.txt" if (tmp_path / "b.txt").write_text("x") else "") == ["x"]


@pytest.mark.parametrize(
    ("name", "split"),
    [
        ("train-00000-of-00005.parquet", "train"),
        ("Squad_Dev.json", "validation"),
        ("trainset.csv", "train"),
        ("val.jsonl.zst", "validation"),
        ("eval.jsonl", "test"),
        ("contest.jsonl", None),
        ("latest.jsonl", None),
        ("training-data-v2.jsonl", "train"),
        ("restaurants.jsonl", None),
        ("The Train to Crystal City.txt", None),
        ("wiki_train.txt", "train"),
    ],
)
def test_the_split_of_a_name(name: str, split: str | None) -> None:
    assert split_of(name) == split


@pytest.mark.parametrize("as_dictionary", [False, True])
def test_a_set_saved_by_datasets_has_its_rows_in_order(tmp_path: Path, as_dictionary: bool) -> None:
    import datasets

    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["no", "yes"])})
    rows = [{"text": f"row {n}", "label": n % 2} for n in range(20)]
    train = datasets.Dataset.from_list(rows, features=features).shuffle(seed=1).select(range(15))
    test = datasets.Dataset.from_list(rows[:3], features=features)
    whole = datasets.DatasetDict({"train": train, "test": test}) if as_dictionary else train
    whole.save_to_disk(str(tmp_path / "saved"), **({} if as_dictionary else {"num_shards": 3}))
    found = [row for _, row in read_rows(str(tmp_path / "saved"))]
    assert found == [{"text": row["text"], "label": ["no", "yes"][row["label"]]} for row in train]
    if as_dictionary:
        assert len(list(read_rows(str(tmp_path / "saved"), split="test"))) == 3
        assert list(survey(str(tmp_path / "saved")).left_out) == ["split test"]


def test_the_fingerprint_is_that_of_the_files_of_the_split(tmp_path: Path) -> None:
    folder = write(tmp_path, "train.jsonl", "test.jsonl")
    before = [fingerprint(str(folder), split=split) for split in ("train", "test")]
    write(folder, "test-2.jsonl")
    after = [fingerprint(str(folder), split=split) for split in ("train", "test")]
    assert before[0] == after[0] != before[1] != after[1]


def test_a_hub_id_stands_for_the_split_that_is_asked_for() -> None:
    assert [str(resolve("owner/name", split)[0]) for split in ("train", "validation")] == [
        "owner/name:/train",
        "owner/name:/validation",
    ]
    assert str(resolve("owner/name:/dev", "validation")[0]) == "owner/name:/dev"
