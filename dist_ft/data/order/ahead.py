"""Micro-batches of the next step, made while the device computes the present one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

from ...state import Batch

Batches = Callable[[int], list[Batch]]


class Ahead:
    """Micro-batches by step, of which those of the next step are made in a thread.

    It is stateless like the loader: any other step than the expected one is made when it is asked for.

    Args:
        batches: Returns the micro-batches of a step.
        ready: Prepares a micro-batch for the copy to the device, such as by pinning its memory.
        last: The last step.
    """

    def __init__(self, batches: Batches, ready: Callable[[Batch], Batch], last: int) -> None:
        self.batches = batches
        self.ready = ready
        self.last = last
        self.thread = ThreadPoolExecutor(1, thread_name_prefix="batches")
        self.expected: tuple[int, Future[list[Batch]]] | None = None

    def step(self, step: int) -> list[Batch]:
        """Return the micro-batches of a step, and begin with those of the next one.

        An error of the thread is raised here, at the step whose micro-batches failed.
        """
        expected, self.expected = self.expected, None
        found = expected[1].result() if expected is not None and expected[0] == step else self._make(step)
        if step < self.last:
            self.expected = step + 1, self.thread.submit(self._make, step + 1)
        return found

    def _make(self, step: int) -> list[Batch]:
        return [self.ready(batch) for batch in self.batches(step)]
