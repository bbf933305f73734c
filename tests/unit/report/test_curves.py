"""Curves are what metrics.jsonl holds; long ones are thinned without losing a peak."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pandas as pd
import pytest

from dist_ft.report.curves import MOST_BUCKETS, Curve, read_curves
from tests.reports import write_run


def test_curves_are_those_of_an_independent_reader(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", steps=60, experts=True)
    table = pd.read_json(run / "metrics.jsonl", lines=True, precise_float=True)
    curves = read_curves(run / "metrics.jsonl")
    assert set(curves) == set(table.columns) - {"step"}
    for name, curve in curves.items():
        wanted = table[["step", name]].dropna()
        assert [tuple(point) for point in curve.points()] == list(wanted.itertuples(index=False, name=None)), name
        assert curve.count == len(wanted)
        assert curve.lowest.value == wanted[name].min() and curve.highest.value == wanted[name].max()
        assert curve.last.value == wanted[name].iloc[-1]


@pytest.mark.parametrize("count", [1, 2, 1999, 2000, 2001, 54_321])
def test_a_long_curve_keeps_its_ends_and_the_extremes_of_every_stretch(count: int) -> None:
    dice = random.Random(count)
    values = [dice.gauss(0, 1) for _ in range(count)]
    curve = Curve(limit=1000)
    for step, value in enumerate(values):
        curve.add(step, value)
    points = curve.points()
    assert len(points) <= 2 * 1000 + 2
    assert all(values[step] == value for step, value in points), "only points that were logged"
    assert points[0] == (0, values[0]) and points[-1] == (count - 1, values[-1])
    width = 1
    while count > 1000 * width:
        width *= 2
    kept = {step for step, _ in points}
    for start in range(0, count, width):  # the stretch of each bucket
        stretch = range(start, min(start + width, count))
        assert min(stretch, key=values.__getitem__) in kept and max(stretch, key=values.__getitem__) in kept
    assert curve.is_thinned == (count > 1000)


def test_values_that_are_no_numbers_are_counted_and_torn_lines_passed_over(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    lines = [{"step": 1, "train/loss": 1.5}, {"step": 2, "train/loss": None}, {"step": 3, "train/loss": 1.25, "x": "y"}]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines) + '{"step": 4, "train/lo')
    curves = read_curves(path)
    assert list(curves) == ["train/loss"]
    assert curves["train/loss"].points() == [(1, 1.5), (3, 1.25)] and curves["train/loss"].missing == 1


def test_the_size_of_what_is_kept_is_bounded(tmp_path: Path) -> None:
    """Metrics of layers, of which there are many, are kept in fewer points than others."""
    path = tmp_path / "metrics.jsonl"
    lines = ({"step": i, "train/loss": i % 97, "moe/layer_0/load_max": i % 89} for i in range(1, 20_001))
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    curves = read_curves(path)
    assert len(curves["train/loss"].buckets) <= MOST_BUCKETS
    assert len(curves["moe/layer_0/load_max"].buckets) <= 200
    assert {curve.count for curve in curves.values()} == {20_000}
