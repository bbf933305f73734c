"""Tests of sweeps: rejected arguments, trials and the summary. Training is replaced by a function."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from dist_ft.config.run import RunConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.sweep import read_words, sweep

ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def check(words: Sequence[str]) -> RunConfig:
    return compose(words).config


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 4)
    return ["data=jsonl", "data.train=rows.jsonl", "data.validation=rows.jsonl", "run_name=found", "method=lora"]


class Trained:
    """Fake `train` that records its arguments and computes a score from them; it fails if the score is None."""

    def __init__(self, score: Callable[[dict[str, str]], float | None], metric: str = "loss") -> None:
        self.score, self.metric = score, metric
        self.runs: list[dict[str, str]] = []

    def __call__(self, words: Sequence[str]) -> int:
        self.runs.append(dict(word.split("=", 1) for word in words))
        folder = Path(self.runs[-1]["output_dir"].strip("'"))
        folder.mkdir(parents=True)
        score = self.score(self.runs[-1])
        if score is None:
            return 4
        lines = [{"step": 0, f"eval/{self.metric}": 99.0}, {"step": 1, f"eval/{self.metric}": score}]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return 0


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs/found/sweep.csv").open()))


def test_a_grid_runs_every_value_once_and_names_the_best(words: list[str], tmp_path: Path, capsys) -> None:
    train = Trained(lambda run: int(run["method.r"]) + float(run["method.lora_dropout"]))
    swept = ["method.r=choice(8,4)", "method.lora_dropout=0.0,0.5", "sampler=grid"]
    assert sweep(read_words([*words, *swept]), check, train) == 0
    tried = {(run["method.r"], run["method.lora_dropout"]) for run in train.runs}
    assert len(train.runs) == 4
    assert tried == {(r, d) for r in "48" for d in ("0.0", "0.5")}
    rows = summary(tmp_path)
    assert [float(row["eval/loss"]) for row in rows] == [4.0, 4.5, 8.0, 8.5]
    assert {run["track.group"] for run in train.runs} == {"found"}
    assert [Path(row["folder"]).is_dir() for row in rows] == [True] * 4
    shown = capsys.readouterr().out
    assert shown.index("4.5") < shown.index("8.5")


def test_a_higher_score_is_searched_where_it_is_better(words: list[str], tmp_path: Path) -> None:
    train = Trained(lambda run: -abs(float(run["optim.learning_rate"]) - 2e-3), metric="accuracy")
    swept = ["optim.learning_rate=tag(log,interval(1e-5,1e-1))", "trials=25", "metric=accuracy"]
    assert sweep(read_words([*words, *swept]), check, train) == 0
    rates = [float(run["optim.learning_rate"]) for run in train.runs]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert 5e-4 < float(summary(tmp_path)[0]["optim.learning_rate"]) < 8e-3


def test_a_run_that_diverges_is_counted_and_the_search_goes_on(words: list[str], tmp_path: Path) -> None:
    train = Trained(lambda run: None if run["method.r"] == "8" else 1.0)
    assert sweep(read_words([*words, "method.r=4,8", "sampler=grid"]), check, train) == 0
    assert [(row["method.r"], row["exit_code"]) for row in summary(tmp_path)] == [("4", "0"), ("8", "4")]


def test_without_a_run_that_ended_well_the_sweep_failed(words: list[str]) -> None:
    assert sweep(read_words([*words, "method.r=4,8", "sampler=grid"]), check, Trained(lambda run: None)) == 4


@pytest.mark.parametrize("code", [2, 3, 75, 129, 130, 143])
def test_what_no_other_value_would_mend_ends_the_sweep(code: int, words: list[str]) -> None:
    runs = []
    assert sweep(read_words([*words, "method.r=4,8"]), check, lambda given: runs.append(given) or code) == code
    assert len(runs) == 1


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["method.r=8"], "no key has several values"),
        (["method.r=4,8", "trials=0"], "trials: Input should be greater"),
        (["method.r=4,8", "sampler=best"], "sampler: Input should be 'tpe'"),
        (["method.r=4,8", "trials=3", "trials=4"], "trials is set more than once"),
        (["method.r=4,8", "none.yaml"], "none.yaml: cannot be read"),
        (["method.r=4,-8"], "method.r"),
        (["method.rr=4,8"], "method.rr"),
        (["method.r=4,8", "data.validation=null"], "data.validation"),
    ],
)
def test_mistakes_are_told_before_anything_runs(more: list[str], message: str, words: list[str]) -> None:
    train = Trained(lambda run: 1.0)
    with pytest.raises(RequestError, match=message):
        sweep(read_words([*words, *more]), check, train)
    assert not train.runs


def test_a_metric_that_the_runs_do_not_have_ends_it_at_the_first(words: list[str]) -> None:
    train = Trained(lambda run: 1.0)
    with pytest.raises(RequestError, match="set one of loss"):
        sweep(read_words([*words, "method.r=4,8", "metric=f1"]), check, train)
    assert len(train.runs) == 1


@pytest.mark.parametrize("seed", [2026112401, 2**64 - 1])
def test_a_search_takes_every_seed_of_the_configuration(words: list[str], tmp_path: Path, seed: int) -> None:
    own = [*words, f"train.seed={seed}", "method.r=4,8", "trials=2", "sampler=random"]
    assert sweep(read_words(own), check, Trained(lambda run: 1.0)) == 0
    assert len(summary(tmp_path)) == 2


def test_folds_are_validation_data_too(words: list[str], tmp_path: Path) -> None:
    rest = [word for word in words if not word.startswith("data.validation=")]
    own = [*rest, "data.folds=2", "method.r=4,8", "sampler=grid"]
    assert sweep(read_words(own), check, Trained(lambda run: 1.0)) == 0
    assert len(summary(tmp_path)) == 2


def test_a_folder_of_an_earlier_sweep_is_left_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs/found").mkdir(parents=True)
    with pytest.raises(RequestError, match="already exists"):
        sweep(read_words([*words, "method.r=4,8"]), check, Trained(lambda run: 1.0))


def test_a_configuration_file_is_the_base_of_every_trial(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("method: {name: lora, r: 2, lora_alpha: 3}\nrun_name: other\n")
    train = Trained(lambda run: float(run["method.r"]))
    given = ["base.yaml", *words, "method.r=4,8", "sampler=grid"]
    search = read_words(given)
    configs = []
    assert sweep(search, lambda tried: configs.append(compose(tried).config) or configs[-1], train_with(train)) == 0
    assert {(config.method.r, config.method.lora_alpha) for config in configs} == {(4, 3), (8, 3)}
    assert len(train.runs) == 2


def train_with(train: Trained) -> Callable[[Sequence[str]], int]:
    """Return a `train` that takes the name of a file as well."""
    return lambda words: train([word for word in words if "=" in word])


def test_without_the_sweeper_it_says_what_to_install(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def find_spec(name: str) -> None:
        raise ModuleNotFoundError(name)  # as importlib does without the package above

    monkeypatch.setattr("importlib.util.find_spec", find_spec)
    with pytest.raises(MachineError, match=r"pip install 'dist-ft\[sweep\]'"):
        sweep(read_words([*words, "method.r=4,8"]), check, Trained(lambda run: 1.0))
