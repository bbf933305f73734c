"""What a run has unlearned: the loss of its base and of its tuned model on general text that it did not train on."""

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
    """The run's model over plain text: in full blocks, or text by text where rows must be padded."""
    content = config.model_dump(mode="json")
    length = config.task.max_length
    padded = config.method.virtual_tokens or config.privacy.is_on
    content["task"] = {"name": "causal_lm", "max_length": length, "packing": not padded}
    if padded:
        content["task"]["overlong"] = "truncate"
    content["data"] = {"train": source, "format": "text", "cache_dir": config.data.cache_dir}
    content["train"]["global_batch_size"] = content["train"]["per_device_train_batch_size"] = 1  # a short text will do
    return RunConfig.model_validate(content)


def measure_forgetting(config: RunConfig, run_dir: Path, source: str) -> tuple[dict[str, Metrics], Split]:
    """Metrics on text of `base` and `export`, and the text as it was prepared.

    Args:
        config: of the run.
        run_dir: its folder.
        source: a file, folder, glob or hub id with rows of text.

    Raises:
        RequestError: the run's model is no causal language model, or the text is wrong.
    """
    if architecture_of(config, Facts()) != CAUSAL_LM:
        rule = f"a model of task={config.task.name} gives no probability to plain text"
        raise RequestError.of(f"general={source}", rule, "remove it; it is for causal language models")
    general = config_of(config, source)
    try:
        prepared = prepare(general)
    except RequestError as error:
        raise RequestError.of(f"general={source}", str(error), "name text: data=text's formats") from error
    device, found = find_device(Place()), {}
    for which in ("base", "export"):
        model, attention = open_model(which, config, prepared, run_dir, device)
        task = build_task(general, prepared.facts, padding_free=attention.padding_free)
        size = config.train.per_device_eval_batch_size
        found[which] = evaluate_model(model, task, prepared.train, size).metrics
        del model  # one at a time
    return found, prepared.train


def render_forgetting(found: Mapping[str, Metrics]) -> tuple[Table, str]:
    """The table, and a sentence."""
    change = found["export"]["loss"] - found["base"]["loss"]
    what = "was forgotten" if change > 0 else "was learned besides"
    factor = found["export"]["perplexity"] / found["base"]["perplexity"]
    return render_table(found), f"{abs(change):.4f} nats a token {what} (perplexity × {factor:.3f})"
