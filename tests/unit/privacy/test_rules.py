"""What differential privacy cannot be combined with is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.checks.request import check
from dist_ft.launch.composition.compose import compose, list_groups
from dist_ft.launch.composition.words import override_words

REFUSED = {
    "privacy.noise_multiplier": ["privacy.noise_multiplier=1"],
    "engine": ["engine=zero2"],
    "method": ["method=ia3"],
    "task.packing": ["task.packing=true"],
    "task.one_row_per_turn": ["task.one_row_per_turn=true"],
    "task.class_weights": ["task=sequence_classification", "task.class_weights=balanced"],
    "train.load_best_model_at_end": [
        "train.load_best_model_at_end=true",
        "train.eval_steps=2",
        "data.validation=rows.jsonl",
    ],
    "train.early_stopping_patience": [
        "train.early_stopping_patience=2",
        "train.eval_steps=2",
        "data.validation=rows.jsonl",
    ],
    "train.resume": ["train.resume=."],
    "task": ["task=preference"],
    "data.mixture": ["data.train=null", "data.mixture.a.train=rows.jsonl"],
    "data.k_shot": ["task=sequence_classification", "data.k_shot=1"],
    "data.folds": ["data.folds=2"],
    "data.max_rows": ["data.max_rows=1"],
    "data.duplicates": ["data.duplicates=drop"],
    "data.validation": ["data.validation=50%"],
    "model.name_or_path": ["model.name_or_path=experts"],
}


@pytest.mark.parametrize("where", REFUSED)
def test_unsound_mixes_are_refused(where: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rows.jsonl").write_text('{"prompt": "a", "completion": "b", "text": "x", "label": "c"}\n')
    (tmp_path / "experts").mkdir()
    (tmp_path / "experts" / "config.json").write_text('{"model_type": "mixtral", "num_local_experts": 4}')

    def problems(*words: str) -> dict[str, str]:
        own = ["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b"]
        composed = compose(override_words(own, words, list_groups()))
        return {problem.where.split(" ")[0]: problem.rule for problem in check(composed.config, composed.origins)}

    rule = problems("privacy.target_epsilon=8", *REFUSED[where])[where]
    assert problems(*REFUSED[where]).get(where) != rule
    assert not problems("privacy.target_epsilon=8")
