"""Progress ticks in long loops (loading, saving, packing), which would otherwise look like a hang."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from transformers.utils import logging

from ..state import Beat


@contextlib.contextmanager
def ticking(tick: Beat) -> Iterator[None]:
    """Return a context in which every item of a transformers progress bar ticks: a tensor loaded, a file saved."""

    def open_bar(bar: Callable[..., Any], arguments: Sequence[Any], options: Mapping[str, Any]) -> _TickingBar:
        return _TickingBar(bar(*arguments, **options), str(options.get("desc") or "model files"), tick)

    before = logging.set_tqdm_hook(open_bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)


class _TickingBar:
    """A progress bar that also ticks."""

    def __init__(self, bar: Any, what: str, tick: Beat) -> None:
        self._bar = bar
        self._what = what
        self._tick = tick
        self._items = 0

    def __iter__(self) -> Iterator[Any]:
        for item in self._bar:
            self._advance()
            yield item

    def __enter__(self) -> _TickingBar:
        self._bar.__enter__()
        return self

    def __exit__(self, *details: Any) -> Any:
        return self._bar.__exit__(*details)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._bar, name)

    def update(self, *amount: Any) -> Any:
        """Advance the bar."""
        self._advance()
        return self._bar.update(*amount)

    def _advance(self) -> None:
        self._items += 1
        self._tick(f"{self._what}, item {self._items}")
