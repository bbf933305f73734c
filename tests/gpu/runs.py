"""One run in a process of its own, on the GPU if there is one; started by the tests as `python -m tests.gpu.runs FILE`.

The file holds the configuration and what to measure; the result is written beside it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[2]


def train(config: dict[str, Any], folder: Path, *, strict: bool = False, **environment: str) -> dict[str, Any]:
    """Train as the configuration says; with `strict`, a wait for the device in a micro-batch is an error.

    Returns `metrics` of each step, the `kernel`, `devices` and dtypes of the optimizer's state, and the memory of the
    GPU before, while and after the last save.

    Raises:
        RuntimeError: The run failed; the text is its output.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "case.json"
    file.write_text(json.dumps({"config": config, "strict": strict}))
    command = [sys.executable, "-m", "tests.gpu.runs", str(file)]
    outside = {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"}
    done = subprocess.run(
        command, cwd=ROOT, env=os.environ | outside | environment, capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stdout + done.stderr)[-4000:])
    found: dict[str, Any] = json.loads(file.with_name("result.json").read_text())
    return found


@contextlib.contextmanager
def without_waits(active: bool) -> Iterator[None]:
    """Return a context in which the host may not wait for the GPU."""
    if active and torch.cuda.is_available():
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        if torch.cuda.is_available():
            torch.cuda.set_sync_debug_mode("default")


def memory() -> tuple[int, int]:
    """Return bytes allocated on the GPU now and at most since the last call."""
    if not torch.cuda.is_available():
        return 0, 0
    now, most = torch.cuda.memory_allocated(), torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return now, most


def main(file: Path) -> None:
    from dist_ft.build import build
    from dist_ft.config.plan import make_plan, write_plan
    from dist_ft.config.run import RunConfig
    from dist_ft.loop import fit
    from dist_ft.prepare import prepare
    from dist_ft.process import comm
    from dist_ft.process.place import Worker, find_device, find_place
    from dist_ft.state import Progress

    case = json.loads(file.read_text())
    config = RunConfig.model_validate(case["config"])
    place = find_place()
    device = find_device(place)
    comm.join(place, comm.open_store(place, 60), device, 120)
    plan = make_plan(config, nodes=1, workers_per_node=place.world_size, origins={})
    write_plan(plan)
    worker = Worker(place, device, sys.stderr, lambda phase: None)
    run = build(plan, prepare(config), worker)
    engine: Any = run.training.engine
    own, own_save, saved, steps = engine.forward_backward, run.records.save, [], []

    def forward_backward(*given: Any, **keys: Any) -> Any:
        steps.append(1)
        with without_waits(case["strict"] and len(steps) > 4):  # caches and buckets are made in the first ones
            return own(*given, **keys)

    def save(progress: Progress) -> None:
        memory()
        before = memory()[0]
        own_save(progress)
        run.records.settle()
        after, most = memory()
        saved[:] = [before, most, after]

    engine.forward_backward = forward_backward
    run.records = replace(run.records, save=save)
    fit(run)
    run.records.tracker.close()
    optimizer = getattr(engine.optimizer, "optimizer", engine.optimizer)
    state = [
        value for values in optimizer.state.values() for value in values.values() if isinstance(value, torch.Tensor)
    ]
    lines = [json.loads(line) for line in (plan.run_dir / "metrics.jsonl").read_text().splitlines()]
    result = {
        "metrics": [line for line in lines if "train/loss" in line],
        "kernel": engine.model.config._attn_implementation,
        "devices": sorted({f"{value.device.type} {value.dim() > 0} {value.dtype}" for value in state}),
        "saved": saved,
    }
    file.with_name("result.json").write_text(json.dumps(result))
    sys.stdout.flush()
    os._exit(0)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
