"""Trackers that combine several trackers or do nothing, so that callers need no branches."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence

from ..protocols import Tracker
from ..state import Metrics


class NullTracker:
    """Tracker that does nothing, for ranks other than 0 and for disabled trackers."""

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Do nothing."""

    def close(self, error: BaseException | None = None) -> None:
        """Do nothing."""


class Trackers:
    """Tracker that forwards all calls to each of `trackers`, in order."""

    def __init__(self, trackers: Sequence[Tracker]) -> None:
        self.trackers = list(trackers)

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log to each tracker."""
        for tracker in self.trackers:
            tracker.log(metrics, step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Close each tracker, in reverse order, even if closing another one fails."""
        with contextlib.ExitStack() as stack:
            for tracker in self.trackers:
                stack.callback(tracker.close, error)


class Guarded:
    """Tracker that never interrupts training: the first error disables what it forwards to, with a warning.

    Args:
        name: Name of the tracker, for the warning.
        tracker: Where metrics go.
        warn: Shows a warning to the user.
    """

    def __init__(self, name: str, tracker: Tracker, warn: Callable[[str], None]) -> None:
        self._name, self._warn = name, warn
        self._tracker: Tracker = tracker

    def log(self, metrics: Metrics, *, step: int) -> None:
        """Log, without the values that are not finite, which not all trackers take."""
        finite = {name: value for name, value in metrics.items() if math.isfinite(value)}
        with self._disabled_on_error():
            self._tracker.log(finite, step=step)

    def close(self, error: BaseException | None = None) -> None:
        """Close the tracker."""
        with self._disabled_on_error():
            self._tracker.close(error)

    @contextlib.contextmanager
    def _disabled_on_error(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self._tracker = NullTracker()
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self._warn(f"{self._name} failed ({reason}) and is disabled")
