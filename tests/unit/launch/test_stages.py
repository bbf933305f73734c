"""Tests of stages: initial models, failures, and resuming with the same command."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest

from dist_ft.checks import request as checks
from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from dist_ft.errors import RequestError
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.stages import read_stages, run_stages

FILE = """\
run_name: books-then-answers
words: [method=full, train.max_steps=2]
stages:
  books: [task=causal_lm, data=text, data.train=book.txt]
  answers: [data=jsonl, data.train=rows.jsonl, method=lora]
  more: [data=jsonl, data.train=rows.jsonl]
"""


def check(words: Sequence[str]) -> RunConfig:
    composed = compose(words)
    if problems := checks.check(composed.config, composed.origins):
        raise RequestError(*problems)
    return composed.config


class Work:
    """Fake `train` and `export` that write the same files and record their arguments."""

    def __init__(self, *, fails_at: str = "", weights: str = "w") -> None:
        self.fails_at, self.weights = fails_at, weights
        self.trained: list[RunConfig] = []
        self.exported: list[Sequence[str]] = []

    def train(self, words: Sequence[str]) -> int:
        config = compose(words).config
        self.trained.append(config)
        if self.fails_at and self.fails_at in config.output_dir:
            return 4
        write_plan(make_plan(config, nodes=1, workers_per_node=1, origins={}))
        out = Path(config.output_dir) / "model"
        out.mkdir(parents=True, exist_ok=True)
        (out / "model.safetensors").write_text(self.weights)
        if config.method.name == "full":
            (out / "config.json").write_text("{}")
        return 0

    def export(self, words: Sequence[str]) -> int:
        self.exported.append(words)
        out = Path(next(word for word in words if word.startswith("out=")).removeprefix("out="))
        out.mkdir()
        (out / "model.safetensors").write_text("merged " + self.weights)
        return 0

    def run(self, file: Path, *more: str) -> int:
        return run_stages(read_stages(file, more), check, self.train, self.export)


@pytest.fixture
def file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time.\n")
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b"}\n')
    (tmp_path / "stages.yaml").write_text(FILE)
    return tmp_path / "stages.yaml"


def test_each_stage_starts_from_the_model_of_the_one_before(file: Path, tmp_path: Path) -> None:
    work = Work()
    assert work.run(file, "train.seed=5") == 0
    books, answers, more = work.trained
    root = tmp_path / "runs/books-then-answers"
    assert [Path(c.output_dir) for c in work.trained] == [root / n for n in ("1-books", "2-answers", "3-more")]
    assert [c.task.name for c in work.trained] == ["causal_lm", "instruction", "instruction"]
    assert books.model.name_or_path.startswith("package:")
    assert answers.model.name_or_path == str(root / "1-books/model")
    assert Path(more.model.name_or_path).parent == root / "2-answers"
    assert Path(more.model.name_or_path).name.startswith("merged-")
    assert [words[:2] for words in work.exported] == [[f"run={root}/2-answers", "merge=true"]]
    assert {c.train.seed for c in work.trained} == {5}


def test_after_a_failure_the_same_command_goes_on(file: Path) -> None:
    assert Work(fails_at="2-answers").run(file) == 4
    work = Work()
    assert work.run(file) == 0
    assert len(work.trained) == 3  # completed stages are called again and have nothing left to do
    again = Work()
    assert again.run(file) == 0
    assert not again.exported


def test_a_stage_never_goes_on_over_another_model(file: Path) -> None:
    assert Work().run(file) == 0
    work = Work(weights="other")
    with pytest.raises(RequestError, match="stage answers: was started from a different model"):
        work.run(file)
    assert len(work.trained) == 1


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("method=lora]", "method=lara]", "(?s)stage answers: .*did you mean method=lora"),
        ("books: [task=causal_lm", "books: [task=causal_lm, train.maxsteps=3", "stage books: train.maxsteps"),
        ("stages:", "steps:", "steps"),
        ("books:", "../books:", "stages"),
        ("data.train=book.txt]", "data.train=book.txt", "is not valid YAML"),
    ],
)
def test_mistakes_are_told_before_anything_runs(old: str, new: str, message: str, file: Path) -> None:
    file.write_text(FILE.replace(old, new))
    work = Work()
    with pytest.raises(RequestError, match=message):
        work.run(file)
    assert not work.trained


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(RequestError, match="cannot be read"):
        read_stages(tmp_path / "none.yaml")
