"""A run that is asked to stop, on any rank and in any phase, loses no step and goes on to the same bits."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch

from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero2")
STEPS, EVERY = 12, 3  # steps, and steps between evaluations


def case(folder: Path, model: str, data: str, engine: str, world: int, ask: dict[str, Any] | None) -> dict[str, Any]:
    config = token_run(folder, model, data, engine, world, 2, True, {"name": "lora", "r": 4, "lora_dropout": 0.2})
    config["data"] |= {"shuffle": True, "validation": data}
    config["train"] |= {"max_steps": STEPS, "eval_steps": EVERY, "per_device_eval_batch_size": 1, "save_minutes": 60}
    return {"config": config, "ask": ask}


def asks(seed: int, world: int) -> list[dict[str, Any]]:
    """A request in each phase, on a rank and in a step that the seed chooses."""
    draw = random.Random(seed)
    return [
        {"rank": draw.randrange(world), "phase": "step", "step": draw.randrange(2, STEPS)},
        {"rank": draw.randrange(world), "phase": "evaluation", "step": EVERY * draw.randrange(1, STEPS // EVERY)},
        {"rank": draw.randrange(world), "phase": "evaluation", "step": STEPS, "micro": 1},
        {"rank": draw.randrange(world), "phase": "save", "step": EVERY},
    ]


def lines_of(folder: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("perf/")} for line in lines]


@pytest.mark.parametrize("world", [1, 2])
def test_a_stopped_run_goes_on_to_the_same_bits(
    world: int, model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    cases, wanted = [], {}
    for seed, engine in enumerate(ENGINES):
        cases.append(case(tmp_path / f"{engine}-whole", model, rows[0], engine, world, None))
        for i, ask in enumerate(asks(100 * world + seed, world)):
            folder = tmp_path / f"{engine}-{i}"
            cases += [case(folder, model, rows[0], engine, world, a) for a in (ask, None)]
            wanted[folder] = (engine, ask)
    (found, *others) = spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)
    assert all([f["step"] for f in other] == [f["step"] for f in found] for other in others), "ranks agree"
    results = {Path(c["config"]["output_dir"]): [] for c in cases}
    for c, result in zip(cases, found, strict=True):
        results[Path(c["config"]["output_dir"])].append(result)
    for folder, (engine, ask) in wanted.items():
        whole = tmp_path / f"{engine}-whole"
        stopped, ended = results[folder]
        # a step in which a rank is asked is finished; an evaluation is not, and neither starts another step
        assert stopped["step"] == ask["step"] and ended["step"] == STEPS, (engine, ask, stopped)
        assert f"SIGTERM: step {ask['step']} of {STEPS} is saved in a checkpoint" in stopped["stopped"]
        assert lines_of(folder) == lines_of(whole), (engine, ask)
        assert [m["step"] for m in metrics_of(folder)] == list(range(1, STEPS + 1))
        one, two = (torch.load(f / "weights.pt", weights_only=True) for f in (whole, folder))
        assert set(one) == set(two) and all(torch.equal(one[name], two[name]) for name in one), (engine, ask)
        best = [(folder / "checkpoints" / "best").resolve().name, (whole / "checkpoints" / "best").resolve().name]
        assert best[0] == best[1], (engine, ask)
