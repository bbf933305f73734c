"""The metrics of a run as curves of bounded size, whatever the length of metrics.jsonl."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from ..track.jsonl import read_metrics

OF_LAYER = re.compile(r"moe/layer_(\d+)/(\w+)")
MOST_BUCKETS = 1000
MOST_COLUMNS = 200  # of a heat map


class Point(NamedTuple):
    """The value of a metric at a step."""

    step: int
    value: float


@dataclass(slots=True)
class Bucket:
    """The smallest and the largest of consecutive points."""

    first_step: int
    low: Point
    high: Point

    def join(self, other: Bucket) -> Bucket:
        """Return the bucket of the points of both; `other` comes later."""
        low = other.low if other.low.value < self.low.value else self.low
        high = other.high if other.high.value > self.high.value else self.high
        return Bucket(self.first_step, low, high)


@dataclass(slots=True)
class Curve:
    """A metric over steps, of which the smallest and the largest point of each bucket are kept.

    Points are added in the order of their steps. When there are more than `limit` buckets, each two neighbours become
    one. The memory is therefore bounded, and no peak is lost.
    """

    limit: int = MOST_BUCKETS
    count: int = 0  # of points, without missing ones
    missing: int = 0  # values that were not finite
    first: Point | None = None
    last: Point | None = None
    buckets: list[Bucket] = field(default_factory=list)
    _width: int = 1  # points of a full bucket
    _in_last: int = 0

    def add(self, step: int, value: float) -> None:
        """Add a point."""
        point = Point(step, value)
        self.count += 1
        self.last = point
        if self.first is None:
            self.first = point
        if self._in_last in (0, self._width):
            if len(self.buckets) == self.limit:
                self._halve()
            self.buckets.append(Bucket(step, point, point))
            self._in_last = 1
            return
        newest = self.buckets[-1]
        self._in_last += 1
        if value < newest.low.value:
            newest.low = point
        elif value > newest.high.value:
            newest.high = point

    def _halve(self) -> None:
        pairs = [self.buckets[i : i + 2] for i in range(0, len(self.buckets), 2)]
        self.buckets = [pair[0].join(pair[1]) if len(pair) == 2 else pair[0] for pair in pairs]
        self._width *= 2

    @property
    def is_thinned(self) -> bool:
        """Whether some points are left out of `points`."""
        return self._width > 1

    @property
    def lowest(self) -> Point | None:
        """The smallest point, the first of several."""
        return min((bucket.low for bucket in self.buckets), key=lambda point: point.value, default=None)

    @property
    def highest(self) -> Point | None:
        """The largest point, the first of several."""
        return max((bucket.high for bucket in self.buckets), key=lambda point: point.value, default=None)

    def points(self) -> list[Point]:
        """Return the points to draw, by step: the first, the last, the smallest and the largest of each bucket."""
        kept = {point for bucket in self.buckets for point in (bucket.low, bucket.high)}
        return sorted(kept | {point for point in (self.first, self.last) if point is not None})


def read_curves(path: Path) -> dict[str, Curve]:
    """Read metrics.jsonl line by line: name → curve, in the order in which the names appear."""
    curves: dict[str, Curve] = {}
    for line in read_metrics(path):
        step = line["step"]
        for name, value in line.items():
            curve = curves.get(name)
            if curve is None:
                curve = curves[name] = Curve(MOST_COLUMNS if OF_LAYER.fullmatch(name) else MOST_BUCKETS)
            if type(value) in (int, float) and math.isfinite(value):
                curve.add(step, value)
            elif value is None:
                curve.missing += 1
    curves.pop("step", None)
    return {name: curve for name, curve in curves.items() if curve.count}


def evaluated(curves: dict[str, Curve]) -> Iterator[str]:
    """Yield the names of the metrics of evaluations."""
    yield from (name for name in curves if name.startswith("eval/"))
