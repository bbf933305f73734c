"""Opening the model of a run or its base model, scoring it on a split, and rendering and writing the results."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from rich.table import Table
from torch import nn

from ..config.run import RunConfig
from ..data.order.loader import split_batches
from ..data.store.opened import Split
from ..errors import RequestError
from ..export.opened import find_export, open_base, open_export
from ..families import architecture_of, choose_attention
from ..model.attention.choice import AttentionChoice
from ..prepare import Prepared
from ..process.sums import Sums
from ..protocols import LossFn, Task
from ..state import LossSum, Metrics, Prediction
from ..task.by_set import ScoreBySet


@dataclass(frozen=True)
class Evaluation:
    """Results of a model on a split: metrics, additional tables and the predictions of all rows."""

    metrics: Metrics
    details: Mapping[str, Any]
    predictions: Sequence[Prediction]


def evaluate_model(model: nn.Module, task: Task, split: Split, per_device: int) -> Evaluation:
    """Evaluate `model` on all rows of a split, on the device of the model."""
    task = ScoreBySet(task, split.sizes) if split.parts else task
    totals, rows = total(model, task, task.score, split, per_device), split.read_rows()
    join = getattr(task, "by_row", None)  # defined by tasks that split a row into several samples
    by_row = join(totals, rows) if join else totals.predictions
    return Evaluation(task.metrics(totals, rows), task.details(totals, rows), by_row)


@torch.no_grad()
def total(model: nn.Module, task: Task, score: LossFn, split: Split, per_device: int) -> LossSum:
    """Return the sums of `score` over all samples of a split, and the predictions in sample order."""
    device = next(model.parameters()).device
    model.eval()
    sums = Sums()
    for batch in split_batches(split, task.collate, rank=0, world=1, per_device=per_device):
        sums.add(score(model, batch.to(device)))
    return replace(sums.total(), predictions=sorted(sums.predictions, key=lambda prediction: prediction["sample"]))


def find_split(prepared: Prepared, name: Literal["train", "validation", "test"]) -> Split:
    """Return a prepared split.

    Raises:
        RequestError: If the run has no split of this name.
    """
    split: Split | None = getattr(prepared, name)
    if split is None:
        raise RequestError.of(f"split={name}", f"the run has no data.{name}", "choose another split")
    return split


def open_model(
    which: str, config: RunConfig, prepared: Prepared, run_dir: Path, device: torch.device, *, padded: bool = False
) -> tuple[nn.Module, AttentionChoice]:
    """Open the model `export` or `base` on `device`, with the attention implementation of the run's configuration.

    With `padded`, the attention supports generation, and padded rows with a mask.
    """
    architecture = architecture_of(config, prepared.facts)
    attention = choose_attention(config, prepared.model_dir, device, architecture)
    attention = attention.padded("as requested") if padded else attention
    options = {"attn_implementation": attention.implementation}
    if which == "base":
        return open_base(config.model, prepared.model_dir, architecture, **options).to(device), attention
    model = open_export(find_export(run_dir), config.model, prepared.model_dir, architecture, **options)
    return model.to(device), attention


def base_of(model: nn.Module) -> nn.Module:
    """Return the model of transformers inside peft's wrapper."""
    unwrapped: Any = getattr(model, "get_base_model", lambda: model)
    inner: nn.Module = unwrapped()
    return inner


def render_table(found: Mapping[str, Metrics]) -> Table:
    """Render a table with one row per metric and one column per model."""
    table = Table(box=None)
    table.add_column("")
    for which in found:
        table.add_column(which, justify="right")
    for name in next(iter(found.values())):
        table.add_row(name, *(f"{metrics[name]:.4f}" for metrics in found.values()))
    return table


def write_lines(path: Path, predictions: Sequence[Prediction]) -> None:
    """Write predictions as JSON Lines atomically."""
    _replace(path, "".join(json.dumps(prediction, ensure_ascii=False) + "\n" for prediction in predictions))


def write_result(path: Path, content: Mapping[str, Any]) -> None:
    """Write results as JSON atomically; missing folders are created."""
    _replace(path, json.dumps(content, indent=2, ensure_ascii=False) + "\n")


def _replace(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.new")
    staging.write_text(text, encoding="utf-8")
    os.replace(staging, path)
