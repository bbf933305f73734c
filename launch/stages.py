"""Several trainings one after another, each starting from the model that the one before has made.

A file of stages names them in their order, with the words of each:

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

Check = Callable[[Sequence[str]], RunConfig]
Run = Callable[[Sequence[str]], int]

EXPORT, MERGED = "model", "merged"  # folders of a run: what it exported, and that put into its base
ORIGIN = ".started-from.sha256"  # beside a run's folder
NAME = r"^[A-Za-z0-9][A-Za-z0-9._-]*$"


class StagesFile(Strict):
    """What a file of stages holds."""

    run_name: Annotated[str, Field(pattern=NAME)]
    output_dir: str | None = None
    words: list[str] = Field(default_factory=list)
    stages: Annotated[dict[Annotated[str, Field(pattern=NAME)], list[str]], Field(min_length=1)]


@dataclass(frozen=True)
class Stage:
    """One training: its folder, and its words but for the model it starts from."""

    name: str
    folder: Path
    words: tuple[str, ...]


def read_stages(path: Path, more: Sequence[str] = ()) -> list[Stage]:
    """The stages of a file; `more` are words for every one of them.

    Raises:
        RequestError: there is no such file, or it is not one of stages.
    """
    try:
        content = StagesFile.model_validate(yaml.safe_load(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise RequestError.of(str(path), "cannot be read", "name a YAML file of stages") from error
    except yaml.YAMLError as error:
        raise RequestError.of(str(path), f"is not YAML ({error})", "see the README, Stages") from error
    except ValidationError as error:
        problems = [
            Problem(f"{path}: {'.'.join(map(str, found['loc']))}", found["msg"], "see the README, Stages")
            for found in error.errors()
        ]
        raise RequestError(*problems) from None
    root = Path(content.output_dir or f"runs/{content.run_name}").absolute()
    stages = []
    for number, (name, words) in enumerate(content.stages.items(), start=1):
        folder = root / f"{number}-{name}"
        own = (f"run_name={content.run_name}-{name}", f"output_dir='{folder}'")
        stages.append(Stage(name, folder, (*content.words, *words, *more, *own)))
    return stages


def run_stages(stages: Sequence[Stage], check: Check, train: Run, export: Run) -> int:
    """Train stage after stage; given again after an interruption, it goes on where it was.

    Args:
        stages: in their order.
        check: composes and checks words, raising a RequestError for wrong ones.
        train: `dist-ft train` with words; its exit code.
        export: `dist-ft export` with words; its exit code.

    Returns:
        0, or the code of the stage that failed: the later ones are not started.

    Raises:
        RequestError: the words of a stage are wrong; nothing was started then.
    """
    problems = list(_problems(stages, check))
    if problems:
        raise RequestError(*problems)
    model: Path | None = None
    for number, stage in enumerate(stages, start=1):
        print(f"dist-ft: stage {number} of {len(stages)}, {stage.name}", flush=True)
        if model is not None:
            _keep_origin(stage, model)
        if code := train([*stage.words, *_start_from(model)]):
            return code
        if number < len(stages):
            model, code = _whole_model(stage, export)
            if code:
                return code
    return 0


def _keep_origin(stage: Stage, model: Path) -> None:
    """Remember which weights a stage starts from; it must not go on from a checkpoint over others.

    Raises:
        RequestError: the stage was begun from other weights.
    """
    kept, digest = stage.folder.with_name(stage.folder.name + ORIGIN), _digest(model)
    if kept.exists() and kept.read_text(encoding="utf-8") != digest:
        rule = "was begun from another model than the stage before it now gives"
        way_out = f"remove {stage.folder} and those after it, or set another run_name"
        raise RequestError.of(f"stage {stage.name}", rule, way_out)
    kept.write_text(digest, encoding="utf-8")


def _digest(folder: Path) -> str:
    """SHA-256 of a folder's weights."""
    digest = hashlib.sha256()
    for file in sorted(folder.glob("*.safetensors")):
        with file.open("rb") as content:
            while piece := content.read(1 << 22):
                digest.update(piece)
    return digest.hexdigest()


def _start_from(model: Path | None) -> list[str]:
    """The words by which a stage takes up the model of the one before, which brings its tokenizer."""
    if model is None:
        return []
    return [
        f"model.name_or_path='{model}'",
        "model.tokenizer=null",
        "model.revision=null",
        "model.from_scratch=false",
    ]


def _whole_model(stage: Stage, export: Run) -> tuple[Path, int]:
    """The folder of the model that a stage made, an adapter put into its base; and an exit code."""
    if (stage.folder / EXPORT / "config.json").exists():
        return stage.folder / EXPORT, 0
    merged = stage.folder / f"{MERGED}-{_digest(stage.folder / EXPORT)[:12]}"
    if merged.exists():
        return merged, 0
    return merged, export([f"run={stage.folder}", "merge=true", f"out={merged}"])


def _problems(stages: Sequence[Stage], check: Check) -> Iterator[Problem]:
    """Every problem of every stage, before the first is started."""
    for number, stage in enumerate(stages):
        # Whether a later one may go on is seen when it does: only then is it known from which model.
        elsewhere = [f"output_dir='{stage.folder}.new'"] if number else []
        try:
            check([*stage.words, *elsewhere])
        except RequestError as error:
            for problem in error.problems:
                yield Problem(f"stage {stage.name}: {problem.where}", problem.rule, problem.way_out)
