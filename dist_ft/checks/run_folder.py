"""Checks of an existing run folder and of the checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from ..config.plan import CHECKPOINTS, LOCK_FILE, RUN_FILE, read_plan, saved_steps
from ..config.run import MAY_CHANGE, SECTIONS, RunConfig, without_sets_keys
from ..errors import Problem, RequestError
from ..privacy.rules import fixes_length


def run_problems(config: RunConfig) -> Iterator[Problem]:
    """Check that an existing folder belongs to the same run and that a given checkpoint exists."""
    folder = Path(config.output_dir)
    resume = config.train.resume
    if resume not in ("auto", "never") and not Path(resume).exists():
        yield Problem(
            "train.resume",
            f"the checkpoint {resume} does not exist",
            "set train.resume to a folder runs/NAME/checkpoints/step-N",
        )
    if not folder.is_dir() or not any(path.name != LOCK_FILE for path in folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        rule = f"{folder} exists but is not a run folder (it has no {RUN_FILE})"
        yield Problem("output_dir", rule, "set run_name to a new name, or output_dir to a new folder")
        return
    checkpoints = saved_steps(folder / CHECKPOINTS)
    if resume == "never" and checkpoints:
        rule = f"{folder} contains {len(checkpoints)} checkpoints, which a new start would overwrite"
        yield Problem("train.resume", rule, f"set run_name={_free_name(folder)}, or remove {folder}")
    elif checkpoints or (folder / "model").exists():
        yield from _difference_problems(config, folder)


def _difference_problems(config: RunConfig, folder: Path) -> Iterator[Problem]:
    way_out = f"set run_name={_free_name(folder)} for a separate run, or restore the old value"
    try:
        old = read_plan(folder).config
    except RequestError as error:
        yield Problem("output_dir", error.problems[0].rule, f"set run_name={_free_name(folder)}")
        return
    for section in SECTIONS:
        before, after = (without_sets_keys(getattr(c, section).model_dump()) for c in (old, config))
        for key in dict.fromkeys([*before, *after]):
            may_change = key in MAY_CHANGE.get(section, ()) and not (section == "train" and fixes_length(config, key))
            if not may_change and before.get(key) != after.get(key):
                rule = (
                    f"the run in {folder} was started with {before.get(key)!r}, but the value is now {after.get(key)!r}"
                )
                yield Problem(f"{section}.{key}", rule, way_out)


def _free_name(folder: Path) -> str:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"
