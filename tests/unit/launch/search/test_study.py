"""Tests of the study of a search: the values that it chooses, and what it keeps."""

from __future__ import annotations

from pathlib import Path

import optuna
import pytest

from dist_ft.errors import RequestError
from dist_ft.launch.search.space import read_search
from dist_ft.launch.search.study import Study
from dist_ft.launch.search.trial import Outcome


def study(tmp_path: Path, *words: str, seed: int = 0) -> Study:
    return Study(read_search(words), tmp_path / "study.journal", seed)


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_every_sampler_chooses_from_the_values(tmp_path: Path, sampler: str) -> None:
    made = study(tmp_path, "method.r=4,8", "method.lora_dropout=range(0.1,0.35,0.1)", f"sampler={sampler}")
    chosen = []
    while started := made.begin():
        chosen.append(tuple(started.values.values()))
        made.finish(started, Outcome("complete", float(len(chosen)), 0, 1.0))
    assert sorted(chosen) == [(r, dropout) for r in ("4", "8") for dropout in ("0.1", "0.2", "0.3")]


def test_integers_stay_integers(tmp_path: Path) -> None:
    made = study(tmp_path, "method.r=tag(log,int(interval(4,64)))", "method.lora_alpha=interval(1,2)", "sampler=random")
    for _ in range(5):
        started = made.begin()
        assert started is not None
        assert 4 <= int(started.values["method.r"]) <= 64
        assert 1 <= float(started.values["method.lora_alpha"]) <= 2


def test_the_same_seed_chooses_the_same_values(tmp_path: Path) -> None:
    words = ["method.lora_dropout=interval(0,1)", "sampler=random"]
    chosen = []
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        (tmp_path / name).mkdir()
        made = study(tmp_path / name, *words, seed=seed)
        chosen.append([made.begin().values for _ in range(3)])
    assert chosen[0] == chosen[1] != chosen[2]


def test_trials_are_kept(tmp_path: Path) -> None:
    """What is read again is what was written, in the file and by Optuna's own words."""
    words = ["method.lora_dropout=interval(0,1)", "sampler=random"]
    outcomes = [
        Outcome("complete", 1.5, 0, 3.0),
        Outcome("pruned", 2.5, 75, 1.0),
        Outcome("failed", None, 4, 2.0),
    ]
    first = study(tmp_path, *words)
    for outcome in outcomes:
        started = first.begin()
        started.report(3, 2.5)
        first.finish(started, outcome)
    first.begin()
    again = study(tmp_path, *words)
    assert again.trials == first.trials
    assert [trial.outcome for trial in again.trials] == outcomes
    backend = optuna.storages.journal.JournalFileBackend(str(tmp_path / "study.journal"))
    found = optuna.load_study(study_name=tmp_path.name, storage=optuna.storages.JournalStorage(backend))
    assert found.best_value == 1.5
    states = [trial.state.name for trial in found.trials]
    assert states == ["COMPLETE", "PRUNED", "FAIL", "FAIL", "WAITING"]  # the last one was interrupted


def test_a_start_that_is_interrupted_again_and_again_queues_its_trial_once(tmp_path: Path) -> None:
    words = ["method.lora_dropout=interval(0,1)"]
    values = study(tmp_path, *words).begin().values
    for _ in range(3):
        study(tmp_path, *words)
    made = study(tmp_path, *words)
    assert made.begin().values == values
    assert made.begin().values != values


def test_a_line_that_was_not_written_completely_is_cut(tmp_path: Path) -> None:
    words = ["method.lora_dropout=interval(0,1)"]
    made = study(tmp_path, *words)
    made.finish(made.begin(), Outcome("complete", 1.0, 0, 1.0))
    with (tmp_path / "study.journal").open("ab") as file:
        file.write(b'{"op_code":4,"wor')
    again = study(tmp_path, *words)
    assert len(again.trials) == 1
    assert again.begin() is not None
    assert len(study(tmp_path, *words).trials) == 1


def test_a_file_that_is_no_study_is_told(tmp_path: Path) -> None:
    (tmp_path / "study.journal").write_text("no journal\nat all\n")
    with pytest.raises(RequestError, match=r"study\.journal: cannot be read"):
        study(tmp_path, "method.r=4,8")


def test_a_file_of_configuration_that_has_changed_is_another_search(tmp_path: Path) -> None:
    file = tmp_path / "base.yaml"
    file.write_text("run_name: a\n")
    study(tmp_path, str(file), "method.r=4,8")
    study(tmp_path, str(file), "method.r=4,8")
    file.write_text("run_name: a\noptim: {eps: 1e-7}\n")
    with pytest.raises(RequestError, match="give the same arguments"):
        study(tmp_path, str(file), "method.r=4,8")


def test_a_score_worse_than_the_median_of_five_is_pruned(tmp_path: Path) -> None:
    made = study(tmp_path, "method.lora_dropout=interval(0,1)")
    for score in (1.0, 1.0, 1.0, 1.0, 1.0):
        started = made.begin()
        assert not started.report(5, score)
        made.finish(started, Outcome("complete", score, 0, 1.0))
    worse = made.begin()
    assert worse.report(5, 1.1)
    assert worse.reported == {5}
    assert not made.begin().report(4, 9.0)  # no other trial has this step
