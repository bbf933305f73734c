"""Loss and task score of a run's model on a split, beside the base's: the numbers that the run itself logs.

`python -m dist_ft.evaluate RUN_YAML [split=validation|test] [baseline=true] [model=export|base] [general=TEXT]
[lm_eval=TASK[,TASK]]`
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import nn

from .comm import Place, find_device
from .errors import RequestError
from .exported import find_export, find_trained_run, open_base, open_export
from .families import architecture_of, build_task, choose_attention
from .model.attention import AttentionChoice
from .parts import split_batches, split_scores
from .plan import read_plan
from .prepare import TASKS, Prepared, Split, prepare
from .reference import REFERENCE_FILE, name_of, read_references, values_of, write_references
from .schema import RunConfig, Strict
from .state import LossFn, LossSum, Metrics, Prediction, Refers, Task
from .strict import Count
from .sums import Sums
from .words import read_words, run_command, split_run


class EvaluateOptions(Strict):
    """What `dist-ft eval` takes."""

    split: Literal["validation", "test"] = Field("validation", description="which data")
    baseline: bool = Field(False, description="true evaluates the base model too")
    model: Literal["export", "base"] = Field("export", description="the run's export, or what it was trained from")
    general: str | None = Field(None, description="general text, to see how much of it was forgotten")
    lm_eval: str | None = Field(None, description="tasks of lm-eval for base and tuned model: TASK[,TASK]")
    lm_eval_path: str | None = Field(None, description="folder with task files of your own")
    lm_eval_limit: Count | None = Field(None, description="only so many rows of each task")
    lm_eval_num_fewshot: Annotated[int, Field(ge=0)] | None = Field(None, description="examples before each question")
    lm_eval_chat: bool | None = Field(None, description="ask through the chat template; if not given, as the run did")


@dataclass(frozen=True)
class Evaluation:
    """What is known of a model on a split: metrics, tables beyond them, and every row's prediction."""

    metrics: Metrics
    details: Mapping[str, Any]
    predictions: Sequence[Prediction]


def evaluate_model(model: nn.Module, task: Task, split: Split, per_device: int) -> Evaluation:
    """The task's metrics of `model`, on the device where it is, over every row of a split."""
    task = split_scores(task, split)
    totals, rows = total(model, task, task.score, split, per_device), split.read_rows()
    join = getattr(task, "by_row", None)  # of tasks that make several samples of a row
    by_row = join(totals, rows) if join else totals.predictions
    return Evaluation(task.metrics(totals, rows), task.details(totals, rows), by_row)


@torch.no_grad()
def total(model: nn.Module, task: Task, score: LossFn, split: Split, per_device: int) -> LossSum:
    """The sums of `score` over every row of a split, and its predictions in the rows' order."""
    device = next(model.parameters()).device
    model.eval()
    sums = Sums()
    for batch in split_batches(split, task.collate, rank=0, world=1, per_device=per_device):
        sums.add(score(model, batch.to(device)))
    return replace(sums.total(), predictions=sorted(sums.predictions, key=lambda prediction: prediction["sample"]))


def find_split(prepared: Prepared, name: Literal["train", "validation", "test"]) -> Split:
    """A prepared split.

    Raises:
        RequestError: the run has none of this name.
    """
    split: Split | None = getattr(prepared, name)
    if split is None:
        raise RequestError.of(f"split={name}", f"the run has no data.{name}", "name another split")
    return split


def open_model(
    which: str, config: RunConfig, prepared: Prepared, run_dir: Path, device: torch.device, *, padded: bool = False
) -> tuple[nn.Module, AttentionChoice]:
    """`export` or `base`, ready to compute on `device` with the attention that the run's configuration gives there.

    `padded`: it is to heed a mask over padded rows, as others lay them out.
    """
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, device, architecture)
    attention = attention.padded() if padded else attention
    options = {"attn_implementation": attention.implementation}
    if which == "base":
        return open_base(config.model, prepared.model_dir, architecture, **options).to(device), attention
    model = open_export(find_export(run_dir), config.model, prepared.model_dir, architecture, **options)
    return model.to(device), attention


def evaluate_run(
    config: RunConfig, prepared: Prepared, run_dir: Path, options: EvaluateOptions
) -> dict[str, Evaluation]:
    """What each model comes to: `base`, `export`, or both."""
    split = find_split(prepared, options.split)
    wanted = ["base", options.model] if options.baseline and options.model != "base" else [options.model]
    device = find_device(Place())
    split = refer_to_base(config, prepared, run_dir, split, device)
    found = {}
    for which in wanted:
        model, attention = open_model(which, config, prepared, run_dir, device)
        task = build_task(config, prepared.facts, padding_free=attention.padding_free)
        found[which] = evaluate_model(model, task, split, config.train.per_device_eval_batch_size)
        del model  # one at a time
    return found


def refer_to_base(config: RunConfig, prepared: Prepared, run_dir: Path, split: Split, device: torch.device) -> Split:
    """The split with what the run compares with; of data that the run did not see, by the base, and kept as well.

    That is the model as the run started: methods whose start is another are refused by checks.py.
    """
    if not issubclass(TASKS[config.task.name], Refers):
        return split
    held = read_references(run_dir / REFERENCE_FILE)
    if name_of(split) not in held:
        model, attention = open_model("base", config, prepared, run_dir, device)
        task = build_task(config, prepared.facts, padding_free=attention.padding_free)
        assert isinstance(task, Refers)
        found = total(model, task, task.refer, split, config.train.per_device_eval_batch_size)
        held[name_of(split)] = values_of(found.predictions)
        write_references(run_dir / REFERENCE_FILE, held)
    return replace(split, reference=held[name_of(split)])


def render_table(found: Mapping[str, Metrics]) -> Table:
    """A row a metric, a column a model."""
    table = Table(box=None)
    table.add_column("")
    for which in found:
        table.add_column(which, justify="right")
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{metrics[name]:.4f}" for metrics in found.values()))
    return table


def main(arguments: list[str]) -> None:
    """Evaluate, print, and write eval-<split>.json and lm-eval.json into the run's folder."""
    run_file, words = split_run(arguments, "evaluate")
    options = read_words(EvaluateOptions, words)
    plan = read_plan(run_file)
    run_dir = find_trained_run(plan, run_file)
    if options.model == "export":
        find_export(run_dir)  # better said before data is prepared
    lm_eval = find_lm_eval(plan.config, options)
    prepared = prepare(plan.config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    console = Console(highlight=False, soft_wrap=True)
    result: dict[str, Any] = {}
    if lm_eval is None or "split" in options.model_fields_set or plan.config.data.has(options.split):
        result = show_split(plan.config, prepared, run_dir, options, console)
    if options.general:
        from .forgetting import measure_forgetting, render_forgetting

        general, text = measure_forgetting(plan.config, run_dir, options.general)
        title = f"\ngeneral: {text.ledger['supervised_tokens']:,} tokens of {options.general}"
        console.print(title, *render_forgetting(general), sep="\n")
        result["general"] = {which: dict(metrics) for which, metrics in general.items()}
    if lm_eval is not None:
        result["lm_eval"] = lm_eval(prepared, run_dir, console)
    if result:
        write_result(run_dir / f"eval-{options.split}.json", result)


def show_split(
    config: RunConfig, prepared: Prepared, run_dir: Path, options: EvaluateOptions, console: Console
) -> dict[str, Any]:
    """Evaluate on the split, print, write every row's prediction; what eval-<split>.json holds of it."""
    found = evaluate_run(config, prepared, run_dir, options)
    ledger = find_split(prepared, options.split).ledger
    title = f"{options.split}: {ledger['samples']:,} samples, {ledger['supervised_tokens']:,} supervised tokens"
    console.print(title, render_table({which: result.metrics for which, result in found.items()}), sep="\n")
    for line in prepared.describe_shared(options.split):
        console.print(line)
    for which, result in found.items():
        if "per_class" in result.details:
            console.print(f"\n{which}:", class_table(result.details), sep="\n")
        if result.predictions:
            suffix = "" if which == options.model else f"-{which}"
            path = run_dir / f"predictions-{options.split}{suffix}.jsonl"
            write_lines(path, result.predictions)
            console.print(f"every row's prediction: {path}")
    details = {which: dict(result.details) for which, result in found.items() if result.details}
    return {
        "metrics": {which: dict(result.metrics) for which, result in found.items()},
        "samples": ledger["samples"],
        "supervised_tokens": ledger["supervised_tokens"],
        **({"details": details} if details else {}),
    }


def find_lm_eval(config: RunConfig, options: EvaluateOptions) -> Callable[[Prepared, Path, Console], Any] | None:
    """What measures, shows and keeps the scores of lm-eval's tasks; None where none was asked for.

    Raises:
        RequestError: there is no such task, or not for this run.
        MachineError: lm-eval is not installed.
    """
    if not any(key.startswith("lm_eval") for key in options.model_fields_set):
        return None
    from .abilities import find_abilities, show_abilities

    abilities = find_abilities(config, options)
    return lambda prepared, run_dir, console: show_abilities(
        abilities, config, prepared, run_dir, options.model, console
    )


def class_table(details: Mapping[str, Any]) -> Table:
    """A row a class; behind it the class that it is most often mistaken for."""
    table = Table(box=None)
    for column in ("", "precision", "recall", "f1", "rows"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("taken for")
    for number, (name, scores) in enumerate(details["per_class"].items()):
        figures = (f"{scores[key]:.3f}" for key in ("precision", "recall", "f1"))
        table.add_row(name, *figures, f"{scores['support']:.0f}", _mistaken(details, number))
    return table


def _mistaken(details: Mapping[str, Any], number: int) -> str:
    if "confusion" not in details:
        return ""
    counts = dict(zip(details["labels"], details["confusion"][number], strict=True))
    del counts[details["labels"][number]]
    most = max(counts, key=lambda name: counts[name])
    return f"{most} ({counts[most]})" if counts[most] else ""


def write_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """Predictions as JSON lines, whole or not at all."""
    _replace(path, "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions))


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """The numbers as JSON, whole or not at all; a folder that is not there is made."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)


if __name__ == "__main__":
    sys.exit(run_command(main))
