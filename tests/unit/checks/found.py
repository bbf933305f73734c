"""What the checks of a request find."""

from __future__ import annotations

from dist_ft.checks.request import check
from dist_ft.launch.composition.compose import Composed, compose, list_groups
from dist_ft.launch.composition.words import override_words

MIXED = ["data=mixture", "data.train=null", "data.mixture.a.train=rows.jsonl"]


def composed(*words: str) -> Composed:
    """Compose a run over `rows.jsonl`; `words` replace the words of this function."""
    own = ["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b"]
    return compose(override_words(own, words, list_groups()))


def found(*words: str) -> dict[str, str]:
    """Rule and way out of each problem of a run over `rows.jsonl`, by its place."""
    run = composed(*words)
    return {problem.where: f"{problem.rule} → {problem.way_out}" for problem in check(run.config, run.origins)}
