"""Runs and caches of earlier versions are still read."""

from __future__ import annotations

from pathlib import Path

import pytest

from dist_ft.config.plan import read_plan
from dist_ft.data.store.identity import split_folder
from dist_ft.errors import RequestError

GOLDEN = Path(__file__).resolve().parents[2] / "golden" / "run-0.1.0.yaml"
ROWS = '{"input_ids": [5, 6, 7, 8], "labels": [-100, 6, 7, 8]}\n{"input_ids": [9, 6, 7], "labels": [-100, 6, 7]}\n'


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    (tmp_path / "rows.jsonl").write_text(ROWS, encoding="utf-8")
    file = tmp_path / "run.yaml"
    file.write_text(GOLDEN.read_text(encoding="utf-8").replace("FOLDER", str(tmp_path)), encoding="utf-8")
    return file


def test_a_saved_plan_is_read(run_file: Path) -> None:
    plan = read_plan(run_file)
    assert (plan.world_size, plan.config.engine.name, plan.config.method.name) == (2, "zero2", "lora")
    assert plan.origins["data"] == "command line: data=tokens"


def test_a_prepared_split_keeps_its_name_in_the_cache(run_file: Path) -> None:
    """The name is that of CODE_VERSION 4: another one would prepare all data anew."""
    assert split_folder(read_plan(run_file).config, "train").name == "2d20eab5a3972d1d15b1859636464444"


def test_a_plan_that_is_not_understood_is_refused_with_the_way_out(run_file: Path) -> None:
    run_file.write_text(run_file.read_text(encoding="utf-8").replace("seed: 7", "seeds: 7"), encoding="utf-8")
    with pytest.raises(RequestError, match="seeds"):
        read_plan(run_file)
