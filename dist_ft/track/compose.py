"""Several trackers as one, and none at all: null objects instead of branches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..state import Metrics, Tracker


class NullTracker:
    """Tracks nothing, on ranks other than 0 and where tracking is off."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Nothing."""

    def close(self) -> None:
        """Nothing."""


class Trackers:
    """Hands everything to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log to each."""
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def close(self) -> None:
        """Close each, in reverse order, also where another one fails."""
        with contextlib.ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)
