"""Evaluation of a run's model, and optionally of its base model, on a split with the metrics that the run logs.

`python -m dist_ft.assess.evaluate RUN_YAML [split=validation|test] [baseline=true] [model=export|base] [general=TEXT]
[lm_eval=TASK[,TASK]]`
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from ..config.plan import REFERENCE_FILE, read_plan
from ..config.run import RunConfig
from ..data.store.opened import Split
from ..export.opened import find_export, find_trained_run
from ..families import build_task, settle_head
from ..prepare import Prepared, describe_data, prepare
from ..process.command import run_command, split_run
from ..process.options import EvaluateOptions, read_words
from ..process.place import Place, find_device
from ..protocols import Refers
from ..task.table import TASKS
from .abilities import find_abilities, show_abilities
from .forgetting import measure_forgetting, render_forgetting
from .reference import name_of, read_references, values_of, write_references
from .scoring import (
    Evaluation,
    base_of,
    evaluate_model,
    find_split,
    open_model,
    render_table,
    total,
    write_lines,
    write_result,
)


def evaluate_run(
    config: RunConfig, prepared: Prepared, run_dir: Path, options: EvaluateOptions
) -> dict[str, Evaluation]:
    """Evaluate `base`, `export` or both on the split, and return the results by model."""
    split = find_split(prepared, options.split)
    wanted = ["base", options.model] if options.baseline and options.model != "base" else [options.model]
    device = find_device(Place())
    split = refer_to_base(config, prepared, run_dir, split, device)
    found = {}
    for which in wanted:
        model, attention = open_model(which, config, prepared, run_dir, device)
        task = build_task(config, prepared.facts, attention)
        settle_head(config, task, base_of(model))
        found[which] = evaluate_model(model, task, split, config.train.per_device_eval_batch_size)
        del model  # keep only one model in memory
    return found


def refer_to_base(config: RunConfig, prepared: Prepared, run_dir: Path, split: Split, device: torch.device) -> Split:
    """Return the split with the reference log-probabilities that the task needs.

    If the run did not compute them for this split, they are computed with the base model and stored. The base model is
    the initial model of the run: checks/combinations.py rejects methods that start from another model.
    """
    if not issubclass(TASKS[config.task.name], Refers):
        return split
    held = read_references(run_dir / REFERENCE_FILE)
    if name_of(split) not in held:
        model, attention = open_model("base", config, prepared, run_dir, device)
        task = build_task(config, prepared.facts, attention)
        settle_head(config, task, base_of(model))
        assert isinstance(task, Refers)
        found = total(model, task, task.refer, split, config.train.per_device_eval_batch_size)
        held[name_of(split)] = values_of(found.predictions)
        write_references(run_dir / REFERENCE_FILE, held)
    return replace(split, reference=held[name_of(split)])


def main(arguments: list[str]) -> None:
    """Run `dist-ft eval`: print the results and write eval-<split>.json and lm-eval.json to the folder of the run."""
    run_file, words = split_run(arguments, "assess.evaluate")
    options = read_words(EvaluateOptions, words)
    plan = read_plan(run_file)
    run_dir = find_trained_run(plan, run_file)
    if options.model == "export":
        find_export(run_dir)  # report a missing export before the data is prepared
    abilities = find_abilities(plan.config, options)
    prepared = prepare(plan.config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    console = Console(highlight=False, soft_wrap=True)
    result: dict[str, Any] = {}
    if abilities is None or "split" in options.model_fields_set or plan.config.data.has(options.split):
        result = show_split(plan.config, prepared, run_dir, options, console)
    if options.general:
        general, text = measure_forgetting(plan.config, run_dir, options.general)
        title = f"\ngeneral text: {text.ledger['supervised_tokens']:,} supervised tokens of {options.general}"
        console.print(title, *render_forgetting(general), sep="\n")
        result["general"] = {which: dict(metrics) for which, metrics in general.items()}
    if abilities is not None:
        shown = show_abilities(abilities, plan.config, prepared, run_dir, options.model, console)
        result["lm_eval"] = shown
    if result:
        write_result(run_dir / f"eval-{options.split}.json", result)


def show_split(
    config: RunConfig, prepared: Prepared, run_dir: Path, options: EvaluateOptions, console: Console
) -> dict[str, Any]:
    """Evaluate on the split, print the results, write the predictions and return the content of eval-<split>.json."""
    found = evaluate_run(config, prepared, run_dir, options)
    ledger = find_split(prepared, options.split).ledger
    title = f"{options.split}: {ledger['samples']:,} samples, {ledger['supervised_tokens']:,} supervised tokens"
    console.print(title, render_table({which: result.metrics for which, result in found.items()}), sep="\n")
    for line in describe_data(config, prepared, options.split):
        console.print(line)
    for which, result in found.items():
        if "per_class" in result.details:
            console.print(f"\n{which}:", class_table(result.details), sep="\n")
        if result.predictions:
            suffix = "" if which == options.model else f"-{which}"
            path = run_dir / f"predictions-{options.split}{suffix}.jsonl"
            write_lines(path, result.predictions)
            console.print(f"predictions of all rows: {path}")
    details = {which: dict(result.details) for which, result in found.items() if result.details}
    return {
        "metrics": {which: dict(result.metrics) for which, result in found.items()},
        "samples": ledger["samples"],
        "supervised_tokens": ledger["supervised_tokens"],
        **({"details": details} if details else {}),
    }


def class_table(details: Mapping[str, Any]) -> Table:
    """Render a table with the scores of each class and the class with which it is most often confused."""
    table = Table(box=None)
    for column in ("", "precision", "recall", "f1", "rows"):
        table.add_column(column, justify="right" if column else "left")
    table.add_column("confused with")
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


if __name__ == "__main__":
    sys.exit(run_command(main))
