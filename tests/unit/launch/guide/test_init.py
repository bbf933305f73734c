"""Tests of `dist-ft init`: the file can be planned, fits its schema, and sets what was answered."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from dist_ft.launch import cli
from dist_ft.launch.composition.compose import compose
from tests.unit.launch.plans import ROWS


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 40)
    return tmp_path


def test_without_a_terminal_the_defaults_are_written(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init"]) == 0
    assert "dist-ft train first.yaml" in capsys.readouterr().out
    text = Path("first.yaml").read_text()
    assert text.startswith("# yaml-language-server: $schema=dist-ft.schema.json\n")
    written, plain = compose(["first.yaml"]).config, compose(["run_name=first"]).config
    assert written == plain
    assert cli.main(["init"]) == 2
    assert Path("first.yaml").read_text() == text, "a file that exists is left alone"


def test_questions_are_asked_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    answers = {"model": "Qwen/Qwen3-0.6B", "data": "rows.jsonl", "method": "full", "gpus": "4", "out": "conf/mine.yaml"}
    asked = []

    def answer(question: str) -> str:
        asked.append(question)
        return answers.get(question.partition(":")[0], "")

    monkeypatch.setattr("builtins.input", answer)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    assert cli.main(["init"]) == 0
    assert [question.partition(":")[0] for question in asked] == ["model", "data", "task", "method", "gpus", "out"]
    assert all(question.endswith("] ") for question in asked), "every question shows its default"
    words = ["model=Qwen/Qwen3-0.6B", "data=rows.jsonl", "method=full", "launch.workers_per_node=4", "run_name=mine"]
    assert compose(["conf/mine.yaml"]).config == compose(words).config


@pytest.mark.parametrize(
    ("words", "place"),
    [
        (["data=none.jsonl"], "none.jsonl: the file or folder does not exist"),
        (["method=lorra"], "did you mean method=lora?"),
        (["metod=lora"], "did you mean method"),
        (["gpus=0"], "gpus"),
        (["out=a.txt"], "out"),
    ],
)
def test_wrong_answers_write_nothing(words: list[str], place: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["init", *words]) == 2
    assert place in capsys.readouterr().err
    assert [path.name for path in Path().iterdir()] == ["rows.jsonl"]


@pytest.mark.parametrize(
    "words", [[], ["data=rows.jsonl", "method=full", "gpus=2"], ["task=reward", "data=rows.jsonl", "method=qlora"]]
)
def test_the_file_fits_its_schema_and_the_schema_is_strict(words: list[str]) -> None:
    assert cli.main(["init", *words, "out=a.yaml"]) == 0
    schema = json.loads(Path("dist-ft.schema.json").read_text())
    jsonschema.Draft202012Validator.check_schema(schema)
    check = jsonschema.Draft202012Validator(schema)
    text = Path("a.yaml").read_text()
    for content in (yaml.safe_load(text.replace("2e-4", "2.0e-4")), {"experiment": "quickstart"}):
        assert list(check.iter_errors(content)) == []
    for wrong in (
        {"metod": "lora"},
        {"method": "lorra"},
        {"method": {"name": "full", "r": 8}},
        {"method": {"lora_r": 8}},
        {"train": {"seed": -1}},
        {"experiment": "none"},
        {"data": {"train": 3}},
    ):
        assert list(check.iter_errors(wrong)), wrong
