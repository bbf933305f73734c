"""Ranks that are killed at any event of a step or a save go on to the same bits: `make faults KILLS=1000`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.runs import token_run

KILLS = int(os.environ.get("KILLS", "8"))
SEED = int(os.environ.get("KILLS_SEED", "13"))
PER_KILL_S = 30

pytestmark = [pytest.mark.faults, pytest.mark.dist, pytest.mark.slow, pytest.mark.timeout(300 + PER_KILL_S * KILLS)]

STEPS, WORLD = 6, 2
METHODS: dict[str, dict[str, Any]] = {
    "full": {"name": "full"},
    "lora": {"name": "lora", "r": 4, "lora_dropout": 0.2},
    "qlora": {"name": "qlora", "r": 4},
}
JOBS = [("ddp", "full"), ("zero2", "lora"), ("fsdp", "full"), ("zero3", "full"), ("ddp", "lora"), ("fsdp", "qlora")]


def test_killed_at_any_event_and_the_same_bits(tmp_path: Path, tiny_llama: Path) -> None:
    rows = tmp_path / "rows.jsonl"
    texts = [list(range(1 + i, 13 + i)) for i in range(32)]
    rows.write_text("".join(json.dumps({"input_ids": t, "labels": [-100] * 6 + t[6:]}) + "\n" for t in texts))
    jobs = {}
    for engine, method in JOBS[: max(2, min(len(JOBS), KILLS // 4))]:
        folder = tmp_path / f"{engine}-{method}"
        config = token_run(folder, str(tiny_llama), str(rows), engine, WORLD, 2, True, METHODS[method])
        config["data"]["shuffle"] = True
        config["train"] |= {"max_steps": STEPS, "save_steps": 2, "save_total_limit": 2}
        jobs[f"{engine}-{method}"] = config
    payload = tmp_path / "payload.json"
    given = {"folder": str(tmp_path), "jobs": jobs, "world": WORLD, "kills": KILLS, "seed": SEED}
    payload.write_text(json.dumps(given))
    done = subprocess.run(
        [sys.executable, "-m", "tests.faults.kills", str(payload)],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr[-4000:]
    found = json.loads(done.stdout.splitlines()[-1])
    print(json.dumps(found))
    assert found["differing"] == [] and found["bad"] == [], found
    assert found["kills"] >= KILLS and found["in_a_save"] >= KILLS / 3, found
