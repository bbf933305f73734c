"""Which checkpoints of a folder a run descends from; others are moved aside and never read.

Each start of a run has an id. A checkpoint holds the ids of the starts that led to it, and the step at which each
began: after a run was resumed from an earlier step, the later checkpoints of the start before it are another branch's.
"""

from __future__ import annotations

import uuid
from dataclasses import replace
from itertools import count
from pathlib import Path

from ..config.plan import saved_steps
from ..errors import Problem
from ..state import Progress
from .files import read_progress, sync_folder

STALE = "stale"


def begin(progress: Progress, settings: str) -> Progress:
    """Return the progress of a start that goes on from `progress`; its checkpoints hold `settings` and a new id."""
    start = (uuid.uuid4().hex[:12], progress.step)
    return replace(progress, lineage=(*progress.lineage, start), settings=settings)


def leads_to(older: Progress, newer: Progress) -> bool:
    """Return whether a run went on from `older` to `newer`.

    Checkpoints without a lineage were written by an earlier version, and are taken for ancestors.
    """
    if older.step > newer.step:
        return False
    known = len(older.lineage)
    if older.lineage != newer.lineage[:known]:
        return not newer.lineage
    return not known or known == len(newer.lineage) or older.step <= newer.lineage[known][1]


def set_aside(path: Path) -> Path:
    """Move a checkpoint into a folder `stale-<n>` beside it, and return its new path."""
    target = next(t for n in count(1) if not (t := path.parent / f"{STALE}-{n}" / path.name).exists())
    target.parent.mkdir(exist_ok=True)
    path.rename(target)
    sync_folder(path.parent)
    return target


def set_strangers_aside(folder: Path, progress: Progress) -> list[Problem]:
    """Move every checkpoint in `folder` that does not lead to `progress` aside, and return a report of each."""
    told = []
    for path in saved_steps(folder):
        try:
            found = read_progress(path)
        except (OSError, ValueError, TypeError, KeyError):
            continue  # incomplete: replaced when the run reaches its step
        if not leads_to(found, progress):
            rule = f"the run goes on from step {progress.step}, to which this checkpoint of another start does not lead"
            told.append(Problem(str(path), rule, f"moved to {set_aside(path)}; delete it if it is not needed"))
    return told
