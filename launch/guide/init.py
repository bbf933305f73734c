"""Write a first configuration file: `dist-ft init`."""

from __future__ import annotations

import json
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import MachineError, RequestError
from ...process.options import InitOptions, read_words
from ..composition import keys
from ..composition.compose import list_groups
from ..composition.paths import CONF_DIR
from ..composition.schema import file_schema
from ..planning import plan_data

SCHEMA_FILE = "dist-ft.schema.json"  # beside the configuration file, which refers to it
WIDTH = 100
QUESTIONS = ("model", "data", "task", "method", "gpus")
TRAIN_KEYS = ("num_train_epochs", "global_batch_size", "eval_steps", "seed")


def init(words: Sequence[str]) -> int:
    """Ask what to train, or take the answers from the words, and write a commented configuration file.

    Args:
        words: Options of the command. Without any, the questions are asked on a terminal.

    Raises:
        RequestError: If an answer is invalid, or the file exists.
        MachineError: If the file cannot be written.
    """
    answers = read_words(InitOptions, words)
    if not words and sys.stdin.isatty():
        answers = read_words(InitOptions, ask())
    path = Path(answers.out)
    if path.exists():
        raise RequestError.of(f"out={path}", "already exists", "set out=FILE to another file")
    plan_data(plan_words(answers), None)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.with_name(SCHEMA_FILE).write_text(json.dumps(file_schema(list_groups()), indent=1) + "\n", "utf-8")
        path.write_text(file_text(answers), "utf-8")
    except OSError as error:
        raise MachineError.of(str(path), f"cannot be written: {error}", "set out=FILE to another file") from error
    print(f"{path} and {path.with_name(SCHEMA_FILE)} are written. Next:")
    print(f"  dist-ft plan {path}     show the run, and start nothing\n  dist-ft train {path}    train")
    return 0


def ask() -> list[str]:
    """Ask the questions on the terminal; an empty answer is the default."""
    words = []
    for name in (*QUESTIONS, "out"):
        field = InitOptions.model_fields[name]
        if answer := input(f"{name}: {field.description} [{field.default}] ").strip():
            words.append(f"{name}={answer}")
    return words


def plan_words(answers: InitOptions) -> list[str]:
    """Return the words of a run with these answers."""
    words = [f"{name}={getattr(answers, name)}" for name in ("model", "data", "task", "method")]
    return [*words, f"launch.workers_per_node={answers.gpus}", f"run_name={run_name(answers)}"]


def run_name(answers: InitOptions) -> str:
    """Return the name of the run: that of the file."""
    return Path(answers.out).name.partition(".")[0]


def file_text(answers: InitOptions) -> str:
    """Return the content of the file."""
    shown, name = answers.out, run_name(answers)
    groups = list_groups()
    lines = [
        f"# yaml-language-server: $schema={SCHEMA_FILE}",
        f"# dist-ft plan {shown}             show the run, and start nothing",
        f"# dist-ft train {shown} KEY=VALUE   train; the same command resumes an interrupted run",
        f"# dist-ft plan {shown} show=config  print every key; dist-ft help KEY explains one",
        "",
        f"# The run is written to runs/{name}.",
        *_yaml({"run_name": name}),
        "",
        f"# {', '.join(groups['model'])}, or a folder, or OWNER/NAME of the Hugging Face Hub",
        *_yaml({"model": answers.model}),
        "",
    ]
    if answers.data in groups["data"]:
        lines += [f"# {', '.join(groups['data'])}, or a file, folder or OWNER/NAME", *_yaml({"data": answers.data})]
    else:
        lines += ["data:", *_indented(_yaml({"train": answers.data}))]
        lines += ["  # rows to evaluate on: a file, or a share of the training rows", "  # validation: 10%"]
    for group in ("task", "method"):
        choice = getattr(answers, group)
        lines += ["", *_comment(", ".join(groups[group])), f"{group}:", *_indented(_yaml({"name": choice}))]
        lines += _defaults(group, CONF_DIR / group / f"{choice}.yaml")
    lines += ["", "train:", *_defaults("train", CONF_DIR / "train.yaml", shown="num_train_epochs")]
    lines += ["", "optim:", *_defaults("optim", CONF_DIR / "optim" / "adamw.yaml", shown="learning_rate")]
    lines += ["", "launch:", "  name: local", "  # one worker per GPU; auto: all GPUs, or 2 workers without one"]
    lines += _indented(_yaml({"workers_per_node": answers.gpus}))
    return "\n".join(lines) + "\n"


def _defaults(section: str, file: Path, shown: str | None = None) -> list[str]:
    """Return the keys of a file of `conf/` after their descriptions: `shown` as a value, the others as comments."""
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    values = {key: content["train"][key] for key in TRAIN_KEYS} if section == "train" else content
    record = keys.chosen({section: content})[section]
    assert record is not None
    lines = []
    for key, value in values.items():
        if key == "name":
            continue
        if description := record.model_fields[key].description:
            lines += _comment(description)
        lines += [line if key == shown else f"# {line}" for line in _yaml({key: value})]
    return _indented(lines)


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, WIDTH - 4)]


def _yaml(content: dict[str, Any]) -> list[str]:
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=WIDTH).splitlines()


def _indented(lines: list[str]) -> list[str]:
    return [f"  {line}" for line in lines]
