"""Tests that the reference is computed once, stored by name of the data, and read again by a resumed run."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from dist_ft.assess import reference
from dist_ft.assess.reference import read_references, refer_to_start, write_references
from dist_ft.checkpoint.resume import settle_start
from dist_ft.config.plan import CHECKPOINTS, REFERENCE_FILE
from dist_ft.config.task import PreferenceConfig
from dist_ft.data.store.opened import Split
from dist_ft.data.store.pack import in_groups
from dist_ft.data.store.table import TableWriter, TokenTable
from dist_ft.prepare import Prepared
from dist_ft.process.place import Place, Worker
from dist_ft.protocols import LossFn
from dist_ft.state import Batch, LossSum
from dist_ft.task.preference import Preference

LENGTHS = [3, 5, 2, 2, 7, 4]  # lengths of the sequences of three pairs


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replace collectives for a single process without a process group."""
    monkeypatch.setattr(reference.comm, "total", lambda value: value)
    monkeypatch.setattr(reference.comm, "gather", lambda value: [value])
    monkeypatch.setattr(reference.comm, "from_main", lambda value: value)


def make_split(folder: Path) -> Split:
    folder.mkdir()
    with TableWriter(folder, ("input_ids", "labels")) as writer:
        rows = [{"input_ids": [length] * length, "labels": [length] * length} for length in LENGTHS]
        writer.extend(TokenTable.of(rows))
    in_groups(np.array(LENGTHS), 2).save(folder)
    return Split(str(folder), str(folder), {"samples": 3})


class Uniform(torch.nn.Module):
    """Model that assigns the same probability to each of eight tokens."""

    def forward(self, input_ids: torch.Tensor, **inputs: Any) -> Any:
        return type("Output", (), {"logits": torch.zeros(*input_ids.shape, 8)})


@dataclass
class Engine:
    """Engine that counts its evaluated micro-batches."""

    asked: int = 0

    def evaluate(self, micro: Batch, loss: LossFn) -> LossSum:
        self.asked += 1
        return loss(Uniform(), micro)


@dataclass
class Train:
    per_device_eval_batch_size: int = 2
    resume: str = "auto"


@dataclass
class Config:
    train: Train = field(default_factory=Train)
    method: None = None


@dataclass
class Plan:
    run_dir: Path
    config: Config = field(default_factory=Config)


def refer(plan: Any, prepared: Prepared, engine: Any) -> Prepared:
    task = Preference(PreferenceConfig(name="preference"), padding_free=False)
    return refer_to_start(
        plan, prepared, task, engine, Worker(Place(), torch.device("cpu"), sys.stderr, lambda phase: None)
    )


def test_it_is_measured_once_and_stands_beside_each_sequence(tmp_path: Path) -> None:
    plan, engine = Plan(tmp_path / "run"), Engine()
    prepared = Prepared("", "", make_split(tmp_path / "one"), make_split(tmp_path / "two"), None)
    found = refer(plan, prepared, engine)
    assert engine.asked == 4
    wanted = -np.log(8) * (np.array(LENGTHS) - 1)  # the first token of a sequence is not predicted
    for split in (found.train, found.validation):
        assert split is not None and split.reference is not None
        np.testing.assert_allclose(split.reference, wanted.reshape(3, 2))
        table = split.open_table()
        np.testing.assert_allclose([table.example(row)["reference"][0] for row in range(6)], wanted)
    again = refer(plan, prepared, engine)
    assert engine.asked == 4 and np.array_equal(again.train.reference, found.train.reference)
    assert [path.name for path in plan.run_dir.iterdir()] == [REFERENCE_FILE]


def test_a_run_that_goes_on_reads_what_was_kept_whatever_the_model_is_by_then(tmp_path: Path) -> None:
    plan, engine = Plan(tmp_path / "run"), Engine()
    prepared = Prepared("", "", make_split(tmp_path / "one"), None, None)
    kept = np.arange(6.0).reshape(3, 2)
    write_references(plan.run_dir / REFERENCE_FILE, {"one": kept})
    assert np.array_equal(refer(plan, prepared, engine).train.reference, kept) and engine.asked == 0


def test_other_data_are_measured_and_kept_too(tmp_path: Path) -> None:
    plan, engine = Plan(tmp_path / "run"), Engine()
    refer(plan, Prepared("", "", make_split(tmp_path / "one"), None, None), engine)
    refer(plan, Prepared("", "", make_split(tmp_path / "two"), None, None), engine)
    assert read_references(plan.run_dir / REFERENCE_FILE).keys() == {"one", "two"} and engine.asked == 4


def test_a_new_run_takes_none_that_another_left(tmp_path: Path) -> None:
    """A run that ended before its first checkpoint may have used another model."""
    plan: Any = Plan(tmp_path / "run")
    own = plan.run_dir / REFERENCE_FILE
    write_references(own, {"one": np.zeros((1, 2))})
    step = plan.run_dir / CHECKPOINTS / "step-3"
    step.mkdir(parents=True)
    settle_start(plan, Place())
    assert own.exists()
    other: Any = Plan(tmp_path / "other", Config(Train(resume=str(step))))
    settle_start(other, Place())
    assert (other.run_dir / REFERENCE_FILE).read_bytes() == own.read_bytes()
    step.rmdir()
    settle_start(plan, Place())
    assert not own.exists()
