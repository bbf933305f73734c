"""A run reads the checkpoints that it descends from, and moves all others aside."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dist_ft.checkpoint import lineage
from dist_ft.checkpoint.files import STATE, read_progress
from dist_ft.config.plan import saved_steps
from dist_ft.state import Progress

NEW = Progress(0, 2, "ddp", None, None, None, 0)


def at(step: int, *lineage: tuple[str, int]) -> Progress:
    return Progress(step, 2, "ddp", None, None, None, 0, lineage=lineage)


A, B, C = ("a", 0), ("b", 4), ("c", 8)


@pytest.mark.parametrize(
    ("older", "newer", "leads"),
    [
        (at(2, A), at(4, A), True),
        (at(4, A), at(4, A), True),
        (at(6, A), at(4, A), False),  # the run was resumed from an earlier step
        (at(4, A), at(6, A, B), True),
        (at(4, A), at(10, A, B, C), True),
        (at(6, A), at(6, A, B), False),  # b began at step 4: step 6 of a is another branch
        (at(6, A), at(10, A, B, C), False),
        (at(8, A, B), at(10, A, B, C), True),
        (at(2, ("x", 0)), at(4, A), False),  # of another run
        (at(2, A, ("y", 1)), at(4, A), False),
        (at(2), at(4, A), True),  # of a version without lineages
        (at(2, A), at(4), True),
        (at(6), at(4, A), False),
    ],
)
def test_what_leads_to_what(older: Progress, newer: Progress, leads: bool) -> None:
    assert lineage.leads_to(older, newer) is leads


def save(folder: Path, progress: Progress) -> None:
    path = folder / f"step-{progress.step}"
    path.mkdir()
    values = {**vars_of(progress), "updates": progress.step}
    (path / STATE).write_text(json.dumps(values))


def vars_of(progress: Progress) -> dict[str, object]:
    return {name: getattr(progress, name) for name in progress.__dataclass_fields__}


def test_each_start_begins_a_branch(tmp_path: Path) -> None:
    first, second = lineage.begin(NEW, "s"), lineage.begin(NEW, "s")
    assert first.lineage != second.lineage and first.settings == "s"
    again = lineage.begin(at(4, *first.lineage), "s")
    assert again.lineage[0] == first.lineage[0] and again.lineage[1][1] == 4
    save(tmp_path, again)
    assert read_progress(tmp_path / "step-4") == again


def test_strangers_are_moved_and_named(tmp_path: Path) -> None:
    for progress in (at(2, A), at(4, A), at(6, A), at(12, A)):
        save(tmp_path, progress)
    (tmp_path / "step-notanumber").mkdir()
    (tmp_path / "step-3").mkdir()  # incomplete
    told = lineage.set_strangers_aside(tmp_path, at(4, A))
    assert [path.name for path in saved_steps(tmp_path)] == ["step-4", "step-3", "step-2"]
    assert (tmp_path / "step-notanumber").is_dir()
    assert [Path(problem.where).name for problem in told] == ["step-12", "step-6"]
    for problem in told:
        moved = tmp_path / "stale-1" / Path(problem.where).name
        assert str(moved) in problem.way_out and (moved / STATE).exists()
    save(tmp_path, at(6, A, B))
    lineage.set_strangers_aside(tmp_path, at(4, A))
    assert (tmp_path / "stale-2" / "step-6").is_dir(), "nothing is overwritten"
