"""Several training runs in sequence, each starting from the model that the previous one exported.

A YAML file lists the stages in order, with the arguments of each:

    run_name: books-then-answers
    words: [model=smollm2, method=full]
    stages:
      books: [task=causal_lm, data=text, data.train=books/*.txt]
      answers: [data=jsonl, data.train=rows.jsonl]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import yaml
from pydantic import Field, ValidationError

from ..config.run import RunConfig
from ..config.strict import Strict
from ..errors import Problem, RequestError
from .composition.compose import list_groups
from .composition.words import override_words

Check = Callable[[Sequence[str]], RunConfig]
Run = Callable[[Sequence[str]], int]

EXPORT, MERGED = "model", "merged"  # folders of a run: its export, and its adapter merged into the base model
ORIGIN = ".started-from.sha256"  # suffix of a file next to the folder of the run
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class StagesFile(Strict):
    """Schema of a stages file."""

    run_name: Annotated[str, Field(pattern=NAME)]
    output_dir: str | None = None
    words: list[str] = Field(default_factory=list)
    stages: Annotated[dict[Annotated[str, Field(pattern=NAME)], list[str]], Field(min_length=1)]


@dataclass(frozen=True)
class Stage:
    """One training run: its folder, and its arguments except those that set the initial model."""

    name: str
    folder: Path
    words: tuple[str, ...]


def read_stages(path: Path, more: Sequence[str] = ()) -> list[Stage]:
    """Read the stages of a file.

    Args:
        path: YAML file with the stages.
        more: Arguments that are added to every stage.

    Raises:
        RequestError: If the file does not exist or is invalid.
    """
    try:
        content = StagesFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RequestError.of(str(path), "cannot be read", "name a YAML file with stages") from error
    except yaml.YAMLError as error:
        raise RequestError.of(str(path), f"is not valid YAML ({error})", "see docs/many-runs.md") from error
    except ValidationError as error:
        problems = [
            Problem(f"{path}: {'.'.join(map(str, found['loc']))}", found["msg"], "see docs/many-runs.md")
            for found in error.errors()
        ]
        raise RequestError(*problems) from None
    root = Path(content.output_dir or f"runs/{content.run_name}").absolute()
    stages, groups = [], list_groups()
    for number, (name, words) in enumerate(content.stages.items(), start=1):
        folder = root / f"{number}-{name}"
        own = (f"run_name={content.run_name}-{name}", f"output_dir='{folder}'")
        chosen: list[str] = list(content.words)
        for later in (words, more, own):
            chosen = override_words(chosen, later, groups)
        stages.append(Stage(name, folder, tuple(chosen)))
    return stages


def run_stages(stages: Sequence[Stage], check: Check, train: Run, export: Run) -> int:
    """Train the stages in order. After an interruption, the same call resumes where it stopped.

    Args:
        stages: Stages in training order.
        check: Composes and checks arguments; raises RequestError if they are invalid.
        train: Runs `dist-ft train` with arguments and returns its exit code.
        export: Runs `dist-ft export` with arguments and returns its exit code.

    Returns:
        0, or the exit code of the first stage that failed. Later stages are not started.

    Raises:
        RequestError: If the arguments of a stage are invalid; in this case no stage was started.
    """
    problems = list(_problems(stages, check))
    if problems:
        raise RequestError(*problems)
    model: Path | None = None
    for number, stage in enumerate(stages, start=1):
        print(f"dist-ft: stage {number} of {len(stages)}, {stage.name}", flush=True)
        if model is not None:
            _keep_origin(stage, model)
        if code := train(override_words(stage.words, _start_from(model), list_groups())):
            return code
        if number < len(stages):
            model, code = _whole_model(stage, export)
            if code:
                return code
    return 0


def _keep_origin(stage: Stage, model: Path) -> None:
    """Record the digest of the initial weights of a stage, so that it is not resumed on top of different weights.

    Raises:
        RequestError: If the stage was started from different weights.
    """
    kept, digest = stage.folder.with_name(stage.folder.name + ORIGIN), _digest(model)
    if kept.exists() and kept.read_text(encoding="utf-8") != digest:
        rule = "was started from a different model than the previous stage now provides"
        way_out = f"remove {stage.folder} and the folders of later stages, or set another run_name"
        raise RequestError.of(f"stage {stage.name}", rule, way_out)
    kept.write_text(digest, encoding="utf-8")


def _digest(folder: Path) -> str:
    """Return the SHA-256 of the weights in a folder."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            while piece := content.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _start_from(model: Path | None) -> list[str]:
    """Return the arguments that set the initial model; its tokenizer is in the same folder."""
    if model is None:
        return []
    return [
        f"model.name_or_path='{model}'",
        "model.tokenizer=null",
        "model.revision=null",
        "model.from_scratch=false",
    ]


def _whole_model(stage: Stage, export: Run) -> tuple[Path, int]:
    """Return the folder of the trained model, with an adapter merged into the base model, and an exit code."""
    if (stage.folder / EXPORT / "config.json").exists():
        return stage.folder / EXPORT, 0
    merged = stage.folder / f"{MERGED}-{_digest(stage.folder / EXPORT)[:12]}"
    if merged.exists():
        return merged, 0
    return merged, export([f"run={stage.folder}", "merge=true", f"out={merged}"])


def _problems(stages: Sequence[Stage], check: Check) -> Iterator[Problem]:
    """Yield the problems of all stages, so that they are reported before the first stage starts."""
    for number, stage in enumerate(stages):
        # Checks of an existing folder need the initial model, which is not yet known for later stages. Check those
        # stages with a new folder; `train` repeats the checks.
        elsewhere = [f"output_dir='{stage.folder}.new'"] if number else []
        try:
            check(override_words(stage.words, elsewhere, list_groups()))
        except RequestError as error:
            for problem in error.problems:
                yield Problem(f"stage {stage.name}: {problem.where}", problem.rule, problem.way_out)
