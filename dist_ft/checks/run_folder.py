"""Rules about a run's folder that already exists, and about the checkpoint to resume from."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..config.plan import RUN_FILE, read_plan
from ..config.run import RunConfig
from ..errors import Problem, RequestError
from ..privacy.rules import fixes_length

# What may differ when a run goes on: how it is executed, watched and for how long, never what is learned from what.
MAY_CHANGE = {
    "model": {"attn_implementation", "gradient_checkpointing", "trust_remote_code"},
    "data": {"cache_dir", "validation", "test"},
    "train": {
        "max_steps",
        "num_train_epochs",
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "logging_steps",
        "eval_steps",
        "save_steps",
        "save_total_limit",
        "early_stopping_patience",
        "resume",
        "timeout_s",
    },
}


def run_problems(config: RunConfig) -> Iterator[Problem]:
    """An existing folder of the run must be this run's, and a checkpoint that is named must exist."""
    folder = Path(config.output_dir)
    resume = config.train.resume
    if resume not in ("auto", "never") and not Path(resume).exists():
        yield Problem("train.resume", f"{resume}: no such checkpoint", "name a folder runs/NAME/checkpoints/step-N")
    if not folder.is_dir() or not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        rule = f"{folder} exists and is not a run's folder (it has no {RUN_FILE})"
        yield Problem("output_dir", rule, "set run_name or output_dir to a new one")
        return
    checkpoints = sorted(folder.glob("checkpoints/step-*"))
    if resume == "never" and checkpoints:
        rule = f"{folder} holds {len(checkpoints)} checkpoints, and starting anew would overwrite them"
        yield Problem("train.resume", rule, f"set run_name={_free_name(folder)}, or remove {folder}")
    elif checkpoints or (folder / "model").exists():
        yield from _difference_problems(config, folder)


def _difference_problems(config: RunConfig, folder: Path) -> Iterator[Problem]:
    way_out = f"set run_name={_free_name(folder)} for a run of its own, or go back to the old value"
    try:
        old = read_plan(folder).config
    except RequestError as error:
        yield Problem("output_dir", error.problems[0].rule, f"set run_name={_free_name(folder)}")
        return
    for section in ("model", "task", "data", "method", "moe", "privacy", "optim", "train"):
        before, after = (_learned(getattr(c, section).model_dump()) for c in (old, config))
        for key in dict.fromkeys([*before, *after]):
            may_change = key in MAY_CHANGE.get(section, ()) and not (section == "train" and fixes_length(config, key))
            if not may_change and before.get(key) != after.get(key):
                rule = f"{folder} is a run with {before.get(key)!r}, and this one has {after.get(key)!r}"
                yield Problem(f"{section}.{key}", rule, way_out)


def _learned(section: dict[str, Any]) -> dict[str, Any]:
    """A section's values, without what the sets of a mixture are only evaluated on."""
    if not section.get("mixture"):
        return section
    sets = {
        name: {key: value for key, value in part.items() if key not in MAY_CHANGE["data"]}
        for name, part in section["mixture"].items()
    }
    return {**section, "mixture": sets}


def _free_name(folder: Path) -> str:
    number = 2
    while folder.with_name(f"{folder.name}-{number}").exists():
        number += 1
    return f"{folder.name}-{number}"
