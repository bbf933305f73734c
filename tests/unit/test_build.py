"""The parts of a run follow from its configuration."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import dist_ft.build
from dist_ft.build import build_privacy, export
from dist_ft.data.order.order import PoissonOrder
from dist_ft.launch.composition.compose import compose
from dist_ft.process.place import Place, Worker


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
