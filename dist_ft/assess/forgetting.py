"""Forgetting: the loss of the base and the tuned model on general text that was not used in training."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from rich.table import Table

from ..config.run import RunConfig
from ..data.store.opened import Split
from ..errors import RequestError
from ..families import architecture_of, build_task
from ..prepare import prepare
from ..process.place import Place, find_device
from ..state import CAUSAL_LM, Facts, Metrics
from .scoring import evaluate_model, open_model, render_table


def config_of(config: RunConfig, source: str) -> RunConfig:
    """Return a configuration of the run's model for plain text, packed unless the run requires padded rows."""
    content = config.model_dump(mode="json")
    length = config.task.max_length
    padded = config.method.virtual_tokens or config.privacy.is_on
    content["task"] = {"name": "causal_lm", "max_length": length, "packing": not padded}
    if padded:
        content["task"]["overlong"] = "truncate"
    content["data"] = {"train": source, "format": "text", "cache_dir": config.data.cache_dir}
    return RunConfig.model_validate(content)


def measure_forgetting(config: RunConfig, run_dir: Path, source: str) -> tuple[dict[str, Metrics], Split]:
    """Compute the metrics of `base` and `export` on general text; also return the prepared text.

    Args:
        config: configuration of the run.
        run_dir: folder of the run.
        source: file, folder, glob or Hub id with rows of text.

    Raises:
        RequestError: If the model of the run is not a causal language model or the text cannot be prepared.
    """
    if architecture_of(config, Facts()) != CAUSAL_LM:
        rule = f"a causal language model is required, but the model of task={config.task.name} is not one"
        raise RequestError.of(f"general={source}", rule, "remove general")
    general = config_of(config, source)
    try:
        prepared = prepare(general)
    except RequestError as error:
        raise RequestError.of(f"general={source}", str(error), "set general to text that data=text can read") from error
    device, found = find_device(Place()), {}
    for which in ("base", "export"):
        model, attention = open_model(which, config, prepared, run_dir, device)
        task = build_task(general, prepared.facts, attention)
        size = config.train.per_device_eval_batch_size
        found[which] = evaluate_model(model, task, prepared.train, size).metrics
        del model  # keep only one model in memory
    return found, prepared.train


def render_forgetting(found: Mapping[str, Metrics]) -> tuple[Table, str]:
    """Render the metrics as a table, and the change of the loss as a sentence."""
    change = found["export"]["loss"] - found["base"]["loss"]
    what = "forgotten" if change > 0 else "gained"
    factor = found["export"]["perplexity"] / found["base"]["perplexity"]
    return render_table(found), f"{abs(change):.4f} nats per token {what} (perplexity × {factor:.3f})"
