"""A mixture's losses, of all and of each set, are the same on one rank and two, and on a run that was resumed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from dist_ft.testing.spawn import spawn
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]


def lines_of(run_dir: Path) -> list[dict[str, float]]:
    """All of metrics.jsonl but what depends on the machine and the day."""
    lines = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def test_losses_of_sets_are_exact_over_ranks_and_restarts(
    model: str, rows: tuple[str, list[dict[str, Any]]], tmp_path: Path
) -> None:
    for name, own in {"some": rows[1][:9], "more": rows[1][9:], "held": rows[1][5:12]}.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in own))

    def config(name: str, engine: str, world: int, packing: bool) -> dict[str, Any]:
        made = token_run(tmp_path / name, model, "", engine, world, 2, packing, {"name": "full"})
        del made["data"]["train"], made["data"]["format"]
        sets = {
            "some": {"weight": 0.4, "validation": str(tmp_path / "held.jsonl")},
            "more": {"weight": 0.6, "validation": str(tmp_path / "more.jsonl")},
        }
        for key, own in sets.items():
            own |= {"train": str(tmp_path / f"{key}.jsonl"), "format": "tokens"}
        made["data"] |= {"mixture": sets, "shuffle": True}
        made["train"] |= {"max_steps": 6, "eval_steps": 3, "save_steps": 3, "global_batch_size": 4 if packing else 8}
        made["train"]["per_device_train_batch_size"] = made["train"]["global_batch_size"] // world // 2
        return made

    one = [{"config": config(f"one-{packing}", "ddp", 1, packing)} for packing in (False, True)]
    two = [{"config": config(f"two-{packing}", "ddp", 2, packing)} for packing in (False, True)]
    begun = config("resumed", "fsdp", 2, False)
    spawn(1, "tests.dist.cases:run_cases", one, timeout_s=120)
    spawn(2, "tests.dist.cases:run_cases", [*two, {"config": begun, "stop_after": 3}, {"config": begun}], timeout_s=120)
    for packing in (False, True):
        alone = lines_of(tmp_path / f"one-{packing}")
        assert [line["step"] for line in alone] == list(range(7))
        assert {"train/loss/some", "train/loss/more", "eval/loss/some", "eval/exact_match/more"} <= set(alone[3])
        assert alone[0]["eval/loss/some"] != alone[0]["eval/loss/more"]
        others = ["two-False", "resumed"] if not packing else ["two-True"]
        for other in others:
            found = lines_of(tmp_path / other)
            for one_line, line in zip(alone, found, strict=True):
                assert line == pytest.approx(one_line, rel=1e-5), (other, line["step"])
