"""Loss and task score of a run's model on a split, beside the base's: the numbers that the run itself logs.

`python -m dist_ft.evaluate RUN_YAML [split=validation|test] [baseline=true] [model=export|base]`
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field
from rich.console import Console
from rich.table import Table
from torch import nn

from .comm import Place, find_device
from .data.loader import evaluation_batches
from .errors import RequestError
from .exported import find_export, find_trained_run, open_base, open_export
from .families import build_task, choose_attention
from .model.attention import AttentionChoice
from .plan import read_plan
from .prepare import Prepared, Split, prepare
from .schema import RunConfig, Strict
from .state import LossSum, Metrics, Task
from .words import read_words, run_command, split_run


class EvaluateOptions(Strict):
    """What `dist-ft eval` takes."""

    split: Literal["validation", "test"] = Field("validation", description="which data")
    baseline: bool = Field(False, description="true evaluates the base model too")
    model: Literal["export", "base"] = Field("export", description="the run's export, or what it was trained from")


@torch.no_grad()
def evaluate_model(model: nn.Module, task: Task, split: Split, per_device: int) -> Metrics:
    """The task's metrics of `model`, on the device where it is, over every row of a split."""
    device = next(model.parameters()).device
    model.eval()
    sums: dict[str, torch.Tensor] = {}
    batches = evaluation_batches(
        split.open_table(), split.open_samples(), task.collate, rank=0, world=1, per_device=per_device
    )
    for batch in batches:
        result = task.score(model, batch.to(device))
        for name, value in {"loss": result.loss, "weight": result.weight, **result.counts}.items():
            sums[name] = sums.get(name, torch.zeros((), dtype=torch.float64)) + value.double().cpu()
    return task.metrics(LossSum(sums.pop("loss"), sums.pop("weight"), sums))


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
    which: str, config: RunConfig, prepared: Prepared, run_dir: Path, device: torch.device
) -> tuple[nn.Module, AttentionChoice]:
    """`export` or `base`, ready to compute on `device` with the attention that the run's configuration gives there."""
    attention = choose_attention(config, prepared.model_dir, device)
    options = {"attn_implementation": attention.implementation}
    if which == "base":
        return open_base(config.model, prepared.model_dir, **options).to(device), attention
    return open_export(find_export(run_dir), config.model, prepared.model_dir, **options).to(device), attention


def evaluate_run(
    config: RunConfig, prepared: Prepared, run_dir: Path, options: EvaluateOptions
) -> dict[str, dict[str, float]]:
    """Metrics by model: `base`, `export`, or both."""
    split = find_split(prepared, options.split)
    wanted = ["base", options.model] if options.baseline and options.model != "base" else [options.model]
    device = find_device(Place())
    found = {}
    for which in wanted:
        model, attention = open_model(which, config, prepared, run_dir, device)
        task = build_task(config, padding_free=attention.padding_free)
        found[which] = dict(evaluate_model(model, task, split, config.train.per_device_eval_batch_size))
        del model  # one at a time
    return found


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
    """Evaluate, print, and write eval-<split>.json into the run's folder."""
    run_file, words = split_run(arguments, "evaluate")
    options = read_words(EvaluateOptions, words)
    plan = read_plan(run_file)
    run_dir = find_trained_run(plan, run_file)
    if options.model == "export":
        find_export(run_dir)  # better said before data is prepared
    prepared = prepare(plan.config, lambda line: print(f"dist-ft: {line}", file=sys.stderr, flush=True))
    found = evaluate_run(plan.config, prepared, run_dir, options)
    ledger = find_split(prepared, options.split).ledger
    title = f"{options.split}: {ledger['samples']:,} samples, {ledger['supervised_tokens']:,} supervised tokens"
    console = Console(highlight=False, soft_wrap=True)
    console.print(title, render_table(found), sep="\n")
    write_result(run_dir / f"eval-{options.split}.json", found, ledger)


def write_result(path: Path, found: Mapping[str, Metrics], ledger: Mapping[str, Any]) -> None:
    """The numbers as JSON, whole or not at all; a folder that is not there is made."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {
        "metrics": {which: dict(metrics) for which, metrics in found.items()},
        "samples": ledger["samples"],
        "supervised_tokens": ledger["supervised_tokens"],
    }
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    os.replace(staging, path)


if __name__ == "__main__":
    sys.exit(run_command(main))
