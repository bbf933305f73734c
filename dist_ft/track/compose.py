"""Trackers that combine several trackers or do nothing, so that callers need no branches."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence

from ..protocols import Tracker
from ..state import Metrics


class NullTracker:
    """Tracker that does nothing, for ranks other than 0 and for disabled trackers."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""


class Trackers:
    """Tracker that forwards all calls to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log to each tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def close(self) -> None:
        """Close each tracker, in reverse order, even if closing another one fails."""
        with contextlib.ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close)
