"""General abilities of the base and tuned model on tasks of lm-eval, EleutherAI's harness (Gao et al. 2021)."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import io
import json
import logging
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from ..config.run import RunConfig
from ..data.render.template import find_end_token
from ..data.render.tokenizer import open_tokenizer
from ..errors import MachineError, RequestError
from ..families import architecture_of
from ..prepare import Prepared
from ..process.options import LmEvalOptions
from ..process.place import Place, find_device
from ..state import CAUSAL_LM, Facts
from .scoring import open_model, write_lines, write_result
from .turns import speaks_chat

RANDOM_SEED, OTHER_SEED = 0, 1234  # defaults of lm-eval's command line, to reproduce published scores
BOOTSTRAP_DRAWS = 1000  # for standard errors of metrics without a closed form


@dataclass(frozen=True)
class Abilities:
    """Requested lm-eval tasks and the options with which they are loaded and evaluated."""

    names: tuple[str, ...]
    manager: Any  # lm_eval.tasks.TaskManager in which the tasks are registered
    limit: int | None
    num_fewshot: int | None
    chat: bool | None

    def load(self) -> dict[str, Any]:
        """Load the tasks and their rows; each call returns new tasks, because they store their requests.

        Raises:
            RequestError: If a task file or its data cannot be loaded, or the task executes code written by the model.
        """
        where = f"lm_eval={','.join(self.names)}"
        try:
            loaded: dict[str, Any] = self.manager.load(list(self.names))
        except Exception as error:  # a task may run any Python code and read any data
            reason = (str(error).strip().splitlines() or [""])[0]
            way_out = "check the task file and its data; without network access, both must be on this machine"
            raise RequestError.of(where, f"cannot be loaded ({type(error).__name__}: {reason})", way_out) from error
        for name, task in loaded["tasks"].items():
            if getattr(task, "UNSAFE_CODE", False) or task.get_config("unsafe_code"):
                rule = f"{name} executes code written by the model, which is not supported"
                raise RequestError.of(where, rule, "run lm-eval itself on the exported model, in a container")
            own = task.get_config("num_fewshot")
            if self.num_fewshot is not None and own == 0 and self.num_fewshot:
                rule = f"the task file of {name} sets num_fewshot: 0, which lm-eval does not override"
                raise RequestError.of(f"lm_eval_num_fewshot={self.num_fewshot}", rule, "remove lm_eval_num_fewshot")
            task.set_config("num_fewshot", (own or 0) if self.num_fewshot is None else self.num_fewshot)
            task.set_fewshot_seed(seed=OTHER_SEED)
        return loaded


@dataclass(frozen=True)
class Outcome:
    """Results of one model: scores by task and lm-eval metric name, and the answers to all rows."""

    scores: Mapping[str, Mapping[str, float]]
    shots: Mapping[str, int]
    rows: Mapping[str, int]
    versions: Mapping[str, Any]
    samples: Sequence[Mapping[str, Any]]


def find_abilities(config: RunConfig, options: LmEvalOptions) -> Abilities | None:
    """Find and load the tasks named by `lm_eval`; return None if `lm_eval` is not set.

    Raises:
        RequestError: If a task or folder does not exist, or the model of the run is not a causal language model.
        MachineError: If lm-eval is not installed.
    """
    if options.lm_eval is None:
        if given := sorted(options.model_fields_set & LmEvalOptions.model_fields.keys()):
            raise RequestError.of(given[0], "has no effect unless lm_eval is set", "set lm_eval=TASK, or remove it")
        return None
    where = f"lm_eval={options.lm_eval}"
    names = tuple(dict.fromkeys(name.strip() for name in options.lm_eval.split(",") if name.strip()))
    if not names:
        raise RequestError.of(where, "names no tasks", "name tasks, for example lm_eval=hellaswag,arc_easy")
    if architecture_of(config, Facts()) != CAUSAL_LM:
        rule = f"lm-eval requires a causal language model, but the model of task={config.task.name} is not one"
        raise RequestError.of(where, rule, "remove lm_eval")
    if find_spec("lm_eval") is None:
        raise MachineError.of(where, "the package lm_eval is not installed", "run pip install 'dist-ft[lm-eval]'")
    folder = options.lm_eval_path
    if folder is not None and not Path(folder).is_dir():
        raise RequestError.of(f"lm_eval_path={folder}", "is not a folder", "set it to a folder with task files (.yaml)")
    manager = _find_manager(names, folder)
    if unknown := [name for name in names if name not in manager.all_tasks]:
        near = {near: None for name in unknown for near in difflib.get_close_matches(name, manager.all_tasks, n=3)}
        way_out = f"did you mean {', '.join(near)}?" if near else "run `lm-eval ls tasks` to list the available tasks"
        way_out += "" if folder else "; for your own tasks set lm_eval_path=FOLDER"
        raise RequestError.of(where, f"lm-eval has no task {', '.join(unknown)}", way_out)
    found = Abilities(names, manager, options.lm_eval_limit, options.lm_eval_num_fewshot, options.lm_eval_chat)
    with _hushed(Counter()):
        found.load()  # report invalid tasks before anything is computed
    return found


def measure_abilities(
    abilities: Abilities, config: RunConfig, prepared: Prepared, run_dir: Path, which: str
) -> tuple[dict[str, Outcome], dict[str, Any]]:
    """Evaluate the models on the tasks and return their results by model, and the settings of the evaluation.

    Args:
        abilities: tasks to evaluate.
        config: configuration of the run.
        prepared: prepared data and tokenizer of the run.
        run_dir: folder of the run.
        which: `export` to evaluate the base model and the export, `base` to evaluate the base model only.

    Raises:
        RequestError: If the run has no tokenizer, or the tokenizer lacks the requested chat template.
    """
    tokenizer = open_tokenizer(config, prepared.tokenizer_dir)
    if tokenizer is None:
        raise RequestError.of("model.tokenizer", "the run has no tokenizer", "set model.tokenizer")
    spoken = speaks_chat(config, tokenizer, prepared.train.ledger["formats"])
    chat = spoken if abilities.chat is None else abilities.chat
    if chat and not tokenizer.chat_template:
        raise RequestError.of("lm_eval_chat=true", "the run's tokenizer has no chat template", "set lm_eval_chat=false")
    wanted = [which] if which == "base" or config.model.from_scratch else ["base", which]
    device, found, told = find_device(Place()), {}, Counter[str]()
    for name in wanted:
        model, _ = open_model(name, config, prepared, run_dir, device, padded=True)
        found[name] = _measure(abilities, config, model, tokenizer, told, chat=chat)
        del model  # keep only one model in memory
    how = {
        "lm_eval": importlib.metadata.version("lm_eval"),
        "chat_template": chat,
        "limit": abilities.limit,
        "warnings": [f"{text} ({count} times)" if count > 1 else text for text, count in told.items()],
    }
    return found, how


def show_abilities(
    abilities: Abilities, config: RunConfig, prepared: Prepared, run_dir: Path, which: str, console: Console
) -> dict[str, dict[str, float]]:
    """Evaluate the tasks, print the scores and write lm-eval.json and all answers.

    Returns:
        The scores by model and `TASK/SCORE`.
    """
    found, how = measure_abilities(abilities, config, prepared, run_dir, which)
    asked = "with the chat template" if how["chat_template"] else "as plain text"
    first = ", " + f"first {abilities.limit} rows of each task" if abilities.limit else ""
    console.print(f"\nlm-eval {how['lm_eval']}: prompts {asked}{first}", render_abilities(found), sep="\n")
    for text in how["warnings"]:
        console.print(f"lm-eval warning: {text}", markup=False)
    write_result(run_dir / "lm-eval.json", summary(found, how))
    for name, outcome in found.items():
        write_lines(run_dir / f"predictions-lm-eval{'-base' if name == 'base' else ''}.jsonl", outcome.samples)
    console.print(f"answers to all rows: {run_dir}/predictions-lm-eval*.jsonl", markup=False)
    return {
        name: {f"{task}/{score}": value for task, scores in outcome.scores.items() for score, value in scores.items()}
        for name, outcome in found.items()
    }


def render_abilities(found: Mapping[str, Outcome]) -> Table:
    """Render a table with one row per score and one column per model; scores are followed by their standard errors."""
    table = Table(box=None)
    table.add_column("")
    for which in found:
        table.add_column(which, justify="right")
    for task, scores in next(iter(found.values())).scores.items():
        for name in scores:
            if "_stderr" not in name:
                table.add_row(f"{task} {name}", *(_shown(outcome.scores[task], name) for outcome in found.values()))
    return table


def summary(found: Mapping[str, Outcome], how: Mapping[str, Any]) -> dict[str, Any]:
    """Return the content of lm-eval.json."""
    first = next(iter(found.values()))
    tasks = {
        name: {"version": first.versions.get(name), "num_fewshot": first.shots.get(name), "rows": first.rows.get(name)}
        for name in first.scores
    }
    return {**how, "tasks": tasks, "scores": {which: dict(outcome.scores) for which, outcome in found.items()}}


def _find_manager(names: Sequence[str], folder: str | None) -> Any:
    """Return a task manager; the tasks of lm-eval, slow to index, are left out if `folder` contains all `names`."""
    from lm_eval.tasks import TaskManager

    with _hushed(Counter()):
        if folder is not None:
            manager = TaskManager(include_path=folder, include_defaults=False)
            if all(name in manager.all_tasks for name in names):
                return manager
        return TaskManager(include_path=folder)


def _measure(
    abilities: Abilities, config: RunConfig, model: nn.Module, tokenizer: Any, told: Counter[str], *, chat: bool
) -> Outcome:
    from lm_eval import evaluator
    from lm_eval.models.huggingface import HFLM

    ends = {find_end_token(tokenizer, config.task), tokenizer.eos_token_id} - {None}
    if (generation := getattr(model, "generation_config", None)) is not None:
        generation.eos_token_id = sorted(ends) or None  # answers must end at the same tokens as in training
    options = {"tokenizer": tokenizer, "batch_size": config.train.per_device_eval_batch_size}
    with _hushed(Counter()):
        harness = HFLM(pretrained=model, **options)
        if config.method.virtual_tokens:  # they use up positions, so both models get the same shorter context
            length = harness.max_length - getattr(config.method, "num_virtual_tokens", 0)
            harness = HFLM(pretrained=model, max_length=length, **options)
        tasks = abilities.load()
    random.seed(RANDOM_SEED)
    np.random.seed(OTHER_SEED)
    torch.manual_seed(OTHER_SEED)
    with _hushed(told):
        result = evaluator.evaluate(
            lm=harness,
            task_dict=tasks,
            limit=abilities.limit,
            bootstrap_iters=BOOTSTRAP_DRAWS,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
        )
    samples = [_sample(task, sample) for task, rows in result.get("samples", {}).items() for sample in rows]
    return Outcome(
        {task: _scores(values) for task, values in {**result["results"], **result.get("groups", {})}.items()},
        result.get("n-shot", {}),
        {task: rows["effective"] for task, rows in result.get("n-samples", {}).items()},
        result.get("versions", {}),
        samples,
    )


def _scores(values: Mapping[str, Any]) -> dict[str, float]:
    """Return the numeric results by lm-eval's `NAME,FILTER`, without the filter `none`."""
    numbers = {name: value for name, value in values.items() if "," in name and isinstance(value, (int, float))}
    return {name.removesuffix(",none"): float(value) for name, value in numbers.items()}


def _sample(task: str, sample: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a sample that are written to disk; values that JSON does not support become strings."""
    kept = {key: sample[key] for key in ("doc_id", "filter", "doc", "target", "filtered_resps") if key in sample}
    scores = {name: sample[name] for name in sample.get("metrics", ()) if name in sample}
    row: dict[str, Any] = json.loads(json.dumps({"task": task, **kept, **scores}, default=str))
    return row


def _shown(scores: Mapping[str, float], name: str) -> str:
    metric, comma, kind = name.partition(",")
    error = scores.get(f"{metric}_stderr{comma}{kind}")
    return _figure(scores[name]) + ("" if error is None else f" ± {_figure(error)}")


def _figure(value: float) -> str:
    return f"{value:.4f}" if abs(value) < 1e6 else f"{value:.4g}"


class _Tally(logging.Handler):
    def __init__(self, told: Counter[str]) -> None:
        super().__init__(logging.WARNING)
        self.told = told

    def emit(self, record: logging.LogRecord) -> None:
        self.told[" ".join(record.getMessage().split())] += 1


@contextlib.contextmanager
def _hushed(told: Counter[str]) -> Iterator[None]:
    """Suppress lm-eval's progress bars, prints and warnings; the warnings are counted in `told`."""
    logger, tally = logging.getLogger("lm_eval"), _Tally(told)
    propagates, level = logger.propagate, logger.level
    logger.propagate = False
    logger.setLevel(logging.WARNING)
    logger.addHandler(tally)
    try:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.removeHandler(tally)
        logger.propagate = propagates
        logger.setLevel(level)
