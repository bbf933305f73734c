"""The parts of a run follow from its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dist_ft.build
from dist_ft.build import build_privacy, build_training, export
from dist_ft.data.order.order import PoissonOrder
from dist_ft.launch.composition.compose import compose
from dist_ft.process.place import Place, Worker
from dist_ft.state import Batch


@pytest.mark.parametrize(("quantization", "hooks"), [("nf4", True), ("int8", False)])
def test_rows_go_one_by_one_where_they_would_change_each_other(quantization: str, hooks: bool) -> None:
    words = ["method=qlora", "model.dtype=float32", f"model.quantization={quantization}", "privacy.noise_multiplier=1"]
    found = build_privacy(compose(words).config, PoissonOrder(100, 1, 10, 1000), 10)
    assert found is not None and found.hooks == hooks


def test_other_ranks_only_take_part_in_the_export(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dist_ft.build, "take_probe", lambda *_: None)
    stand_in: Any = SimpleNamespace(
        config=compose(["method=lora"]).config,
        run_dir=tmp_path,
        train=SimpleNamespace(first_sample=lambda: None),
        weights=lambda *, trainable: ((name, torch.zeros(1)) for name in ("a", "b") if trainable),
    )
    ticks: list[str] = []
    worker = Worker(Place(1, 2, 1), torch.device("cpu"), sys.stderr, lambda phase: None, ticks.append)
    export(stand_in, stand_in, stand_in, stand_in, stand_in, worker)
    assert ticks == ["sending a", "sending b"] and not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", ["cpu", "cuda"])
def test_micro_batches_for_a_gpu_are_pinned_and_made_ahead(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[int] = []
    monkeypatch.setattr(dist_ft.build, "build_loader", lambda *_: SimpleNamespace(step=lambda n: made.append(n) or [n]))
    monkeypatch.setattr(dist_ft.build, "Meter", lambda *_: None)
    monkeypatch.setattr(Batch, "pinned", lambda batch: -batch)
    begun: list[torch.device] = []
    monkeypatch.setattr(torch.cuda, "set_device", begun.append)
    device = torch.device(kind, 0)
    worker = Worker(Place(0, 1, 0), device, sys.stderr, lambda phase: None)
    part: Any = SimpleNamespace(
        config=compose(["method=lora"]).config, train=SimpleNamespace(parts=None), epoch_at=None
    )
    training = build_training(part, part, part, part, part, 2, part, None, worker)
    assert training.batches(1) + training.batches(2) == ([-1, -2] if kind == "cuda" else [1, 2])
    assert made == [1, 2] and begun == ([device] if kind == "cuda" else [])
