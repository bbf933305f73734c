"""Folders of runs that were not trained, with everything that a report can show."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dist_ft.config.plan import make_plan, write_plan
from dist_ft.config.run import RunConfig
from tests.runs import token_run

STEPS, LAYERS = 60, 3
ACCOUNT = {
    "rows_read": 40, "rows_kept": 37, "tokens": 5_000, "samples": 37, "supervised_tokens": 2_000, "longest": 99,
    "layout": "rows", "formats": ["tokens"], "files": {"rows.jsonl": 40}, "file_count": 1,
    "dropped": {"the text is empty": 3}, "truncated_rows": 2, "truncated_tokens": 11,
}  # fmt: skip
RECORD = {
    "started": "2026-01-01T00:00:00+00:00",
    "versions": {"python": "3.11.7", "torch": "2.13.0"},
    "platform": "Linux 6.1, x86_64",
    "devices": {"NVIDIA H100 80GB HBM3": 2},
    "memory": [
        {"name": "frozen weights", "device": 3 * 2**30, "host": 0, "why": "replicated"},
        {"name": "AdamW moments", "device": 2**30, "host": 0, "why": "float32, replicated"},
    ],
    "data": {"train": ACCOUNT, "validation": {**ACCOUNT, "dropped": {}}},
    "mixture": [],
}


def metrics_at(step: int, *, experts: bool = False) -> dict[str, float]:
    """Metrics of a training step."""
    found: dict[str, float] = {
        "epoch": step / 10,
        "train/loss": 2.0 * math.exp(-step / 40) + 0.1 * math.sin(step),
        "train/grad_norm": 1.0 + 0.3 * math.cos(step),
        "train/learning_rate": 1e-3 * (1 - step / 200),
        "train/supervised_tokens": 100.0,
        "perf/tokens_per_second": 1000.0 + step % 7,
        "perf/step_time_s": 0.5,
        "perf/peak_memory_bytes": 5.5 * 2**30,
        "perf/mfu": 0.41,
    }
    if experts:
        found["moe/load_max"] = 1.5
        for layer in range(LAYERS):
            found[f"moe/layer_{layer}/load_max"] = 1.0 + layer + step / 100
            found[f"moe/layer_{layer}/load_min"] = 1.0 - layer / 10
    return found


def write_run(
    folder: Path, *, steps: int = STEPS, experts: bool = False, record: Mapping[str, Any] = RECORD, **groups: Any
) -> Path:
    """Write run.yaml, record.json and metrics.jsonl; `groups` replace groups of the configuration."""
    config = token_run(folder, "models/tiny", "rows.jsonl", "ddp", 2, 1, False, {"name": "lora", "r": 4})
    config["train"]["max_steps"] = STEPS
    config |= groups
    origins = {"method.r": "command line", "launch.setup": "command line"}
    write_plan(make_plan(RunConfig.model_validate(config), nodes=1, workers_per_node=2, origins=origins))
    (folder / "record.json").write_text(json.dumps(record), encoding="utf-8")
    with (folder / "metrics.jsonl").open("w", encoding="utf-8") as file:
        for step in range(steps + 1):
            line: dict[str, float] = {"step": step, **(metrics_at(step, experts=experts) if step else {})}
            if step % 20 == 0:
                line |= {"eval/loss": 2.0 - step / 100, "eval/exact_match": step / 100}
            file.write(json.dumps(line) + "\n")
    return folder


def finish(folder: Path) -> None:
    """Add an export and a checkpoint."""
    for name in ("model", "checkpoints/step-60"):
        (folder / name).mkdir(parents=True)
    (folder / "model" / "README.md").write_text("# card\n", encoding="utf-8")
    (folder / "checkpoints" / "step-60" / "state.json").write_text("{}" * 2048, encoding="utf-8")
    (folder / "checkpoints" / "latest").symlink_to("step-60")


def status_in_report(run: Path) -> str:
    """The status that the report of a run shows."""
    (found,) = re.findall(r'<span class="status \w+">(\w+)</span>', (run / "report.html").read_text(encoding="utf-8"))
    return str(found)
