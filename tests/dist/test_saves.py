"""Saves in the background: the same bytes and curve as without, on every engine; an error reaches every rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from dist_ft.checkpoint.reader import SafeReader
from dist_ft.testing.spawn import spawn
from tests.dist.cases import metrics_of
from tests.runs import token_run

pytestmark = [pytest.mark.dist, pytest.mark.timeout(600)]

ENGINES = ("ddp", "fsdp", "zero2", "zero3")
STEPS, EVERY = 5, 2


def case(folder: Path, model: str, data: str, engine: str, async_save: bool, world: int = 2) -> dict[str, Any]:
    method = {"name": "full"} if engine != "zero2" else {"name": "lora", "r": 4, "lora_dropout": 0.2}
    config = token_run(folder, model, data, engine, world, 2, True, method)
    config["train"] |= {"max_steps": STEPS, "save_steps": EVERY, "async_save": async_save}
    return {"config": config}


def test_the_same_bytes_on_every_engine(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    folders = {(engine, later): tmp_path / f"{engine}-{later}" for engine in ENGINES for later in (True, False)}
    spawn(2, "tests.dist.cases:run_cases", [case(f, model, rows[0], *key) for key, f in folders.items()], timeout_s=500)
    for engine in ENGINES:
        one, other = folders[engine, True], folders[engine, False]
        curves = [[m["train/loss"] for m in metrics_of(folder)] for folder in (one, other)]
        assert curves[0] == curves[1] and len(curves[0]) == STEPS
        for step in (2, 4, 5):
            found = [folder / "checkpoints" / f"step-{step}" for folder in (one, other)]
            names = [sorted(path.name for path in checkpoint.iterdir()) for checkpoint in found]
            assert names[0] == names[1] and {"__0_0.distcp", "__1_0.distcp"} <= set(names[0])
            for name in names[0]:
                if name.endswith(".distcp"):
                    assert (found[0] / name).read_bytes() == (found[1] / name).read_bytes(), (engine, step, name)


def test_the_last_optimizer_state_can_be_left_out(model: str, rows: tuple[str, list[dict]], tmp_path: Path) -> None:
    folder = tmp_path / "run"
    first = case(folder, model, rows[0], "ddp", True, world=1)
    first["config"]["train"] |= {"save_final_state": False}
    spawn(1, "tests.dist.cases:run_cases", [first, first])  # the second time it only exports
    names = [SafeReader(folder / "checkpoints" / f"step-{step}").read_metadata().state_dict_metadata for step in (4, 5)]
    assert {name.partition("/")[0] for name in names[0]} == {"model", "exp_avg", "exp_avg_sq"}
    assert set(names[1]) == {name for name in names[0] if name.startswith("model/")}
    assert [m["step"] for m in metrics_of(folder)] == [1, 2, 3, 4, 5]
    longer = case(folder, model, rows[0], "ddp", True, world=1)
    longer["config"]["train"]["max_steps"] = 7
    with pytest.raises(RuntimeError, match=r"step-5: holds no optimizer state .*, so it cannot go on to step 7"):
        spawn(1, "tests.dist.cases:run_cases", [longer])
    longer["config"]["train"]["resume"] = str(folder / "checkpoints" / "step-4")
    spawn(1, "tests.dist.cases:run_cases", [longer])
    assert [m["step"] for m in metrics_of(folder)] == [1, 2, 3, 4, 5, 6, 7]


def test_an_error_of_one_rank_is_raised_by_all_and_nothing_is_published(tmp_path: Path) -> None:
    found = spawn(2, "tests.dist.saves:fail_on_rank_1", str(tmp_path))
    assert [f["own"] for f in found] == [False, True]
    assert all("refused by the disk" in f["raised"] for f in found)
    assert [path.name for path in tmp_path.glob("step-*")] == ["step-1"]
    assert (tmp_path / "latest").resolve().name == "step-1"
