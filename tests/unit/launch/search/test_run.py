"""Tests of sweeps: rejected arguments, trials and the summary. Training is replaced by a function."""

from __future__ import annotations

import csv
import json
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import pytest

from dist_ft.config.run import RunConfig
from dist_ft.errors import MachineError, RequestError
from dist_ft.launch.composition.compose import compose
from dist_ft.launch.machine.environ import Site
from dist_ft.launch.planning import plan_run
from dist_ft.launch.search.run import Start, sweep
from dist_ft.launch.search.space import read_search

SITE = Site(python="python", cwd="/work", cores=2)
ROWS = '{"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}\n'


def composed(words: Sequence[str]) -> RunConfig:
    return compose(words).config


def check(words: Sequence[str]) -> RunConfig:
    return plan_run(words, None, SITE)[0].config


@pytest.fixture
def words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text(ROWS * 4)
    return ["data=jsonl", "data.train=rows.jsonl", "data.validation=rows.jsonl", "run_name=found", "method=lora"]


class Done:
    """Fake process that ends with a code, after a number of looks at it; signals change the code."""

    def __init__(self, code: int, looks: int = 0, on_look: Callable[[], object] = lambda: None) -> None:
        self.code, self.looks, self.on_look = code, looks, on_look
        self.signals: list[int] = []

    def poll(self) -> int | None:
        if self.signals:
            return 75
        if self.looks:
            self.looks -= 1
            self.on_look()
            return None
        return self.code

    def send_signal(self, number: int) -> None:
        self.signals.append(number)


class Trained:
    """Fake start of a run that records its arguments and computes a score from them; it fails if the score is None."""

    def __init__(self, score: Callable[[dict[str, str]], float | None], metric: str = "loss") -> None:
        self.score, self.metric = score, metric
        self.runs: list[dict[str, str]] = []
        self.environments: list[Mapping[str, str]] = []

    def __call__(self, words: Sequence[str], environment: Mapping[str, str], output: Path | None) -> Done:
        self.runs.append(dict(word.split("=", 1) for word in words if "=" in word))
        self.environments.append(environment)
        folder = Path(self.runs[-1]["output_dir"].strip("'"))
        folder.mkdir(parents=True, exist_ok=True)
        score = self.score(self.runs[-1])
        if score is None:
            return Done(4)
        write(folder, [99.0, score], self.metric)
        return Done(0)


def write(folder: Path, scores: Sequence[float], metric: str = "loss") -> None:
    lines = [{"step": step, f"eval/{metric}": score} for step, score in enumerate(scores)]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))


def search(words: Sequence[str], start: Start, devices: Sequence[int] = ()) -> int:
    return sweep(read_search(words), composed, check, start, devices, poll_s=0, look_s=0)


def summary(folder: Path) -> list[dict[str, str]]:
    return list(csv.DictReader((folder / "runs/found/sweep.csv").open()))


def test_a_grid_runs_every_value_once_and_names_the_best(words: list[str], tmp_path: Path, capsys) -> None:
    train = Trained(lambda run: int(run["method.r"]) + float(run["method.lora_dropout"]))
    swept = ["method.r=choice(8,4)", "method.lora_dropout=0.0,0.5", "sampler=grid"]
    assert search([*words, *swept], train) == 0
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
    assert search([*words, *swept], train) == 0
    rates = [float(run["optim.learning_rate"]) for run in train.runs]
    assert all(1e-5 <= rate <= 1e-1 for rate in rates)
    assert 5e-4 < float(summary(tmp_path)[0]["optim.learning_rate"]) < 8e-3


def test_a_run_that_diverges_is_counted_and_the_search_goes_on(words: list[str], tmp_path: Path) -> None:
    train = Trained(lambda run: None if run["method.r"] == "8" else 1.0)
    assert search([*words, "method.r=4,8", "sampler=grid"], train) == 0
    assert [(row["method.r"], row["exit_code"]) for row in summary(tmp_path)] == [("4", "0"), ("8", "4")]


def test_without_a_run_that_ended_well_the_sweep_failed(words: list[str]) -> None:
    assert search([*words, "method.r=4,8", "sampler=grid"], Trained(lambda run: None)) == 4


@pytest.mark.parametrize("code", [2, 3, 75, 129, 130, 143])
def test_what_no_other_value_would_mend_ends_the_sweep(code: int, words: list[str]) -> None:
    runs = []
    assert search([*words, "method.r=4,8"], lambda given, *_: runs.append(given) or Done(code)) == code
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
        search([*words, *more], train)
    assert not train.runs


def test_a_metric_that_the_runs_do_not_have_ends_it_at_the_first(words: list[str]) -> None:
    train = Trained(lambda run: 1.0)
    with pytest.raises(RequestError, match="set one of loss"):
        search([*words, "method.r=4,8", "metric=f1"], train)
    assert len(train.runs) == 1


@pytest.mark.parametrize("seed", [2026112401, 2**64 - 1])
def test_a_search_takes_every_seed_of_the_configuration(words: list[str], tmp_path: Path, seed: int) -> None:
    own = [*words, f"train.seed={seed}", "method.r=4,8", "trials=2", "sampler=random"]
    assert search(own, Trained(lambda run: 1.0)) == 0
    assert len(summary(tmp_path)) == 2


def test_folds_are_validation_data_too(words: list[str], tmp_path: Path) -> None:
    rest = [word for word in words if not word.startswith("data.validation=")]
    own = [*rest, "data.folds=2", "method.r=4,8", "sampler=grid"]
    assert search(own, Trained(lambda run: 1.0)) == 0
    assert len(summary(tmp_path)) == 2


def test_a_folder_with_something_else_is_left_alone(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "runs/found").mkdir(parents=True)
    (tmp_path / "runs/found/run.yaml").touch()
    with pytest.raises(RequestError, match="already exists, and is not that of a search"):
        search([*words, "method.r=4,8"], Trained(lambda run: 1.0))


def test_a_configuration_file_is_the_base_of_every_trial(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "base.yaml").write_text("method: {name: lora, r: 2, lora_alpha: 3}\nrun_name: other\n")
    configs = []
    train = Trained(lambda run: float(run["method.r"]))

    def start(tried: Sequence[str], environment: Mapping[str, str], output: Path | None) -> Done:
        configs.append(compose(tried).config)
        return train(tried, environment, output)

    assert search(["base.yaml", *words, "method.r=4,8", "sampler=grid"], start) == 0
    assert [(config.method.r, config.method.lora_alpha) for config in configs] == [(4, 3), (8, 3)]


def test_without_optuna_it_says_what_to_install(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "dist_ft.launch.search.study", raising=False)
    monkeypatch.setitem(sys.modules, "optuna", None)
    train = Trained(lambda run: 1.0)
    with pytest.raises(MachineError, match=r"pip install 'dist-ft\[sweep\]'") as told:
        search([*words, "method.r=4,8"], train)
    assert told.value.exit_code == 3
    assert not train.runs
    assert not Path("runs").exists()


def test_no_combination_is_run_twice(words: list[str], tmp_path: Path) -> None:
    train = Trained(lambda run: 1.0)
    assert search([*words, "method.r=4,8", "method.use_dora=true,false", "trials=20", "sampler=random"], train) == 0
    assert len(train.runs) == 4
    assert len({(run["method.r"], run["method.use_dora"]) for run in train.runs}) == 4
    assert {row["trial"] for row in summary(tmp_path)} == set("0123")


@pytest.mark.parametrize("code", [75, 137 - 9 + 15])
def test_a_search_that_was_stopped_goes_on_with_the_interrupted_trial(code: int, words: list[str], tmp_path) -> None:
    """The interrupted trial gets the same values and the same folder, and finished ones are not run again."""
    own = [*words, "optim.learning_rate=tag(log,interval(1e-5,1e-1))", "trials=5"]
    first = Trained(lambda run: float(run["optim.learning_rate"]))

    def start(words: Sequence[str], *rest: object) -> Done:
        done = first(words, {}, None)
        return Done(code) if len(first.runs) == 3 else done

    assert search(own, start) == code
    assert len(summary(tmp_path)) == 2
    second = Trained(lambda run: float(run["optim.learning_rate"]))
    assert search(own, second) == 0
    assert second.runs[0] == first.runs[2]
    assert len(second.runs) == 3
    rates = {run["optim.learning_rate"] for run in [*first.runs, *second.runs]}
    assert len(rates) == 5
    assert {row["optim.learning_rate"] for row in summary(tmp_path)} == rates
    assert [Path(row["folder"]).name for row in sorted(summary(tmp_path), key=lambda row: row["trial"])] == [
        f"trial-00{number}" for number in range(5)
    ]


def test_a_search_that_is_complete_runs_nothing_more_unless_more_trials_are_wanted(words: list[str]) -> None:
    own = [*words, "method.lora_dropout=interval(0.1,0.9)"]
    assert search([*own, "trials=2"], Trained(lambda run: 1.0)) == 0
    again = Trained(lambda run: 1.0)
    assert search([*own, "trials=2"], again) == 0
    assert not again.runs
    assert search([*own, "trials=3"], again) == 0
    assert len(again.runs) == 1


def test_a_folder_of_another_search_is_refused(words: list[str]) -> None:
    assert search([*words, "method.r=4,8"], Trained(lambda run: 1.0)) == 0
    with pytest.raises(RequestError, match=r"was started with method\.r=4,8, and not method\.r=4,16"):
        search([*words, "method.r=4,16"], Trained(lambda run: 1.0))
    with pytest.raises(RequestError, match="arguments: the search in this folder was started with"):
        search([*words, "method.r=4,8", "train.max_steps=7"], Trained(lambda run: 1.0))


@pytest.mark.parametrize(("pruner", "states"), [("median", ["complete"] * 6 + ["pruned"]), ("none", ["complete"] * 7)])
def test_a_run_that_is_worse_than_the_median_is_stopped(
    pruner: str, states: list[str], words: list[str], tmp_path: Path
) -> None:
    """Five runs are never stopped, the sixth is better than the median of 1 to 5, and the seventh is worse."""
    scores = [1.0, 2.0, 3.0, 4.0, 5.0, 2.5, 4.5]
    processes: list[Done] = []

    def start(words: Sequence[str], *rest: object) -> Done:
        score = scores[len(processes)]
        folder = Path(next(word for word in words if word.startswith("output_dir=")).partition("=")[2].strip("'"))
        # step 0 comes before training and does not count; the run ends with a better score
        write(folder, [9.0, score, 0.5])
        processes.append(Done(0, looks=2, on_look=lambda: write(folder, [9.0, score])))
        processes[-1].on_look()
        return processes[-1]

    own = [*words, "method.lora_dropout=interval(0.1,0.9)", "trials=7", f"pruner={pruner}"]
    assert search(own, start) == 0
    rows = sorted(summary(tmp_path), key=lambda row: row["trial"])
    assert [row["state"] for row in rows] == states
    assert [float(row["eval/loss"]) for row in rows] == scores
    assert [process.signals for process in processes] == [[15] if state == "pruned" else [] for state in states]
    assert rows[-1]["exit_code"] == ("75" if pruner == "median" else "0")


def test_jobs_run_side_by_side_on_their_own_gpus(words: list[str], tmp_path: Path) -> None:
    train = Trained(lambda run: float(run["method.lora_dropout"]))
    running: list[Done] = []
    most = []

    def start(words: Sequence[str], environment: Mapping[str, str], output: Path | None) -> Done:
        train(words, environment, output)
        assert output is not None
        assert output.parent == tmp_path / "runs/found"
        running.append(Done(0, looks=3))
        most.append(sum(process.looks > 0 for process in running))
        return running[-1]

    own = [*words, "method.lora_dropout=interval(0.1,0.9)", "trials=6", "jobs=2"]
    assert search(own, start, devices=(0, 1, 2, 3, 4)) == 0
    assert len(summary(tmp_path)) == 6
    assert max(most) == 2
    assert {environment["CUDA_VISIBLE_DEVICES"] for environment in train.environments} == {"0,1", "2,3"}
    with pytest.raises(RequestError, match="set jobs=1 or fewer"):
        search(own, start, devices=(0,))


def test_jobs_on_hosts_run_one_at_a_time(words: list[str], tmp_path: Path) -> None:
    (tmp_path / "hosts").write_text("one slots=1\n")
    own = [*words, "launch=deepspeed", "launch.hostfile=hosts", "method.r=4,8", "jobs=2"]
    with pytest.raises(RequestError, match="launch=deepspeed runs one at a time"):
        search(own, Trained(lambda run: 1.0))


def test_a_trial_that_ends_the_search_stops_the_others(words: list[str], tmp_path: Path) -> None:
    processes = [Done(3), Done(0, looks=100)]
    given = iter(processes)
    own = [*words, "method.lora_dropout=interval(0.1,0.9)", "trials=6", "jobs=2"]
    assert search(own, lambda *_: next(given)) == 3
    assert [process.signals for process in processes] == [[], [15]]


def test_a_signal_stops_the_trials(words: list[str], tmp_path: Path) -> None:
    process = Done(0, looks=1000, on_look=lambda: os.kill(os.getpid(), signal.SIGTERM))
    assert search([*words, "method.r=4,8"], lambda *_: process) == 75
    assert set(process.signals) == {15}
