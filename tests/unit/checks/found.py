"""What the checks of a request find."""

from __future__ import annotations

from dist_ft.checks.request import check
from dist_ft.launch.composition.compose import compose

MIXED = ["data=mixture", "data.train=null", "data.mixture.a.train=rows.jsonl"]


def found(*words: str) -> dict[str, str]:
    """Rule and way out of each problem of a run over `rows.jsonl`, by its place."""
    composed = compose(["data=jsonl", "data.train=rows.jsonl", "model=hub", "model.name_or_path=a/b", *words])
    return {
        problem.where: f"{problem.rule} → {problem.way_out}" for problem in check(composed.config, composed.origins)
    }
