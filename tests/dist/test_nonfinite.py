"""A step that is not finite changes nothing: the run ends with the checkpoint before it, or goes on behind it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp

from dist_ft.checkpoint.files import STATE
from dist_ft.checkpoint.reader import SafeReader
from dist_ft.config.plan import saved_steps
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero1", "zero2", "zero3")
STEPS, BAD = 5, 3
VALUES = {"ddp": math.nan, "fsdp": math.inf, "zero1": math.nan, "zero2": math.inf, "zero3": math.nan}


def case(folder: Path, model: str, data: str, engine: str, world: int, policy: str, dtype: str) -> dict[str, Any]:
    config = token_run(folder, model, data, engine, world, 2, True, {"name": "full"})
    config["model"]["dtype"] = dtype
    config["train"] |= {"max_steps": STEPS, "save_steps": 1, "on_nonfinite": policy}
    return {"config": config, "poison": {"rank": world - 1, "steps": [BAD], "value": VALUES[engine]}}


def tensors_of(folder: Path, step: int) -> dict[str, torch.Tensor]:
    path = folder / "checkpoints" / f"step-{step}"
    entries = SafeReader(path).read_metadata().state_dict_metadata
    found = {name: torch.zeros(entry.size, dtype=entry.properties.dtype) for name, entry in entries.items()}
    dcp.load(found, storage_reader=SafeReader(path), no_dist=True)
    return found


def curve_of(folder: Path) -> list[float]:
    lines = [m for m in metrics_of(folder) if m["step"] != BAD]
    return [value for m in lines for value in (m["train/loss"], m["train/grad_norm"])]


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
@pytest.mark.parametrize(("world", "dtype"), [(1, "float32"), (2, "float32"), (2, "bfloat16")])
def test_a_step_that_is_not_finite_on_one_rank(
    world: int, dtype: str, model: str, rows: tuple[str, list[dict]], tmp_path: Path
) -> None:
    engines = ENGINES if dtype == "float32" else ENGINES[::2]
    folders = {(engine, policy): tmp_path / f"{engine}-{policy}" for engine in engines for policy in ("skip", "stop")}
    cases = [case(folder, model, rows[0], key[0], world, key[1], dtype) for key, folder in folders.items()]
    found = dict(zip(folders, spawn(world, "tests.dist.cases:run_cases", cases, timeout_s=500)[0], strict=True))
    for engine in engines:
        stopped, skipped = folders[engine, "stop"], folders[engine, "skip"]
        assert f"step {BAD}: loss is " in found[engine, "stop"]["failed"], engine
        assert [path.name for path in saved_steps(stopped / "checkpoints")] == ["step-2", "step-1"], engine
        assert [m["step"] for m in metrics_of(stopped)] == [1, 2]
        assert found[engine, "skip"]["step"] == STEPS
        assert [m.get("train/update_skipped", 0) for m in metrics_of(skipped)] == [0, 0, 1, 0, 0], engine
        before, bad, after = (tensors_of(skipped, step) for step in (BAD - 1, BAD, BAD + 1))
        assert all(torch.equal(bad[name], before[name]) for name in before), engine
        assert all(tensor.isfinite().all() for tensor in after.values()), engine
        assert any(not torch.equal(after[name], bad[name]) for name in bad), engine
        updates = [(skipped / "checkpoints" / f"step-{s}" / STATE).read_text().count('"updates": 2') for s in (2, 3)]
        assert updates == [1, 1], engine
    if dtype == "float32":
        curves = {engine: curve_of(folders[engine, "skip"]) for engine in ENGINES}
        for engine in ENGINES[1:]:
            assert curves[engine] == pytest.approx(curves["ddp"], rel=1e-5), engine
