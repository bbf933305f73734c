"""Arguments of `dist-ft sweep`: options, the arguments of every run, and the values of each key to search.

Search spaces use Hydra's syntax: `4,8`, `choice(4, 8)`, `range(1, 9, 2)`, `interval(0.1, 0.9)`,
`int(interval(4, 64))`, `tag(log, interval(1e-5, 1e-3))`, and `glob(*)` for all choices of a group.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Glob, IntervalSweep, Override, RangeSweep

from ...errors import RequestError
from ...process.options import SweepOptions, read_words, split_words
from ...state import LOWER_IS_BETTER
from ..composition.compose import list_groups
from ..composition.file import is_file

WAY_OUT = "write KEY=choice(A,B), KEY=range(START,STOP,STEP) or KEY=interval(LOW,HIGH)"
WITH_LOG = "write tag(log, interval(LOW,HIGH))"
INSIDE = (math.sqrt(5) - 1) / 2  # a place in an interval that is neither an end nor a round number
MOST_COMBINATIONS = 10_000  # above it, combinations are not listed


@dataclass(frozen=True)
class Axis:
    """The values of a key: either a list of them, or the numbers from `low` to `high`.

    Attributes:
        key: Dotted key, or group.
        word: The argument as it was written.
        values: Values of a choice or range, as they are written after `=`; empty for an interval.
        ordered: Whether `values` are numbers at equal distances, in ascending order.
        low: Lower end of an interval, an integer if only integers are searched.
        high: Upper end of an interval, which belongs to it.
        log: Whether an interval is searched on a logarithmic scale.
    """

    key: str
    word: str
    values: tuple[str, ...] = ()
    ordered: bool = False
    low: float = 0
    high: float = 0
    log: bool = False

    @property
    def samples(self) -> list[str]:
        """All values of a list; of an interval both ends and, between real numbers, one that is not an integer."""
        if self.values:
            return list(self.values)
        whole = isinstance(self.low, int)
        return [str(self.low), str(self.high), *([] if whole else [str(self.low + INSIDE * (self.high - self.low))])]

    @property
    def size(self) -> float:
        """Number of values; infinite for an interval of real numbers."""
        if self.values:
            return len(self.values)
        return self.high - self.low + 1 if isinstance(self.low, int) else math.inf

    def listed(self) -> list[str]:
        """Return all values of an axis with a finite number of them."""
        return list(self.values) or [str(value) for value in range(int(self.low), int(self.high) + 1)]


@dataclass(frozen=True)
class Search:
    """A search: arguments for every run, the values of each key, and the options of the command."""

    fixed: tuple[str, ...]
    axes: tuple[Axis, ...]
    options: SweepOptions

    @property
    def keys(self) -> list[str]:
        """The keys that are searched."""
        return [axis.key for axis in self.axes]

    @property
    def metric(self) -> str:
        """Name of the metric, without `eval/`."""
        return self.options.metric.removeprefix("eval/")

    @property
    def lower_is_better(self) -> bool:
        """Whether a lower value of the metric is better."""
        return self.metric.partition("/")[0] in LOWER_IS_BETTER

    def combinations(self) -> Iterator[tuple[str, ...]] | None:
        """Return all combinations of values, in the order of the keys; None if they are too many to be listed."""
        if math.prod(axis.size for axis in self.axes) > MOST_COMBINATIONS and self.options.sampler != "grid":
            return None
        return itertools.product(*(axis.listed() for axis in self.axes))


def read_search(words: Sequence[str]) -> Search:
    """Parse the arguments of `dist-ft sweep`.

    Raises:
        RequestError: If an option or a search space is invalid, or no key has several values.
    """
    own, rest = split_words(SweepOptions, words)
    options = read_words(SweepOptions, own)
    fixed: list[str] = []
    axes: list[Axis] = []
    for word in rest:
        override = None if is_file(word) else _parse(word)
        if override is None or not override.is_sweep_override():
            fixed.append(word)
            continue
        axis = _axis(word, override)
        if axis.key in [other.key for other in axes]:
            raise RequestError.of(word, f"{axis.key} has values already", "keep one of them")
        if options.sampler == "grid" and axis.size == math.inf:
            raise RequestError.of(word, "has no end of values for sampler=grid", "write range(START,STOP,STEP)")
        axes.append(axis)
    if not axes:
        raise RequestError.of("dist-ft sweep", "no key has several values", "write for example method.r=choice(4,8)")
    return Search(tuple(fixed), tuple(axes), options)


def _parse(word: str) -> Override:
    try:
        override: Override = OverridesParser.create().parse_override(word)
    except Exception as error:  # Hydra's parser raises several unrelated types
        raise RequestError.of(word, "cannot be parsed", WAY_OUT) from error
    return override


def _axis(word: str, override: Override) -> Axis:
    """Build the axis of an argument with several values.

    Raises:
        RequestError: If it has no values, or is an interval that cannot be searched.
    """
    key = override.key_or_group
    space: Any = override.value()
    if isinstance(space, IntervalSweep):
        return _interval(word, key, space)
    if isinstance(space, Glob):
        values = space.filter(list_groups().get(key, []))
    elif isinstance(space, RangeSweep):
        values = _range(space)
    else:
        values = list(override.sweep_string_iterator())
    if not values:
        raise RequestError.of(word, "has no value", WAY_OUT)
    if len(set(values)) < len(values):
        raise RequestError.of(word, "has a value twice", "write each once")
    if tags := getattr(space, "tags", None):
        raise RequestError.of(
            word, f"the tag {', '.join(sorted(tags))} is for intervals", "write tag(log, interval(LOW,HIGH))"
        )
    if isinstance(space, RangeSweep):
        return Axis(key, word, tuple(sorted(values, key=float)), ordered=len(values) > 1)
    # An order that is drawn anew by each start would be that of another search.
    shuffled = isinstance(space, ChoiceSweep) and space.shuffle
    return Axis(key, word, tuple(sorted(values) if shuffled else values))


def _range(space: RangeSweep) -> list[str]:
    """Return the numbers of a range in decimal arithmetic: in binary, 0, 0.1, … would end with 0.4 before 0.4."""
    start, stop, step = (Decimal(str(number)) for number in (space.start, space.stop, space.step))
    count = math.ceil((stop - start) / step) if step else 0
    return [str(start + i * step) for i in range(count)]


def _interval(word: str, key: str, space: IntervalSweep) -> Axis:
    low, high = space.start, space.end
    if unknown := sorted(space.tags - {"log"}):
        raise RequestError.of(
            word, f"the tag {', '.join(unknown)} has no meaning", "write tag(log, interval(LOW,HIGH))"
        )
    log = "log" in space.tags
    if low is None or high is None or not low < high or not math.isfinite(high - low):
        raise RequestError.of(word, "its lower end is not below its upper end", "write interval(LOW,HIGH)")
    if log and low <= 0:
        raise RequestError.of(word, "a logarithmic scale has positive numbers only", "set a lower end above 0")
    return Axis(key, word, low=low, high=high, log=log)
