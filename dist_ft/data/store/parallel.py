"""Encoding of rows in several processes, with results in the order of the rows.

Rows are encoded in the same portions whatever the number of processes, so that tables, ledgers and errors do not depend
on it.
"""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from itertools import chain
from multiprocessing.connection import wait
from typing import Any

from ...errors import DistFtError, MachineError
from ..read.file.json_file import JsonLine
from .encode import EncodedRows, Numbered, RowEncoder

ROWS_AT_ONCE = 256
CHARACTERS_AT_ONCE = 1 << 20
START_AFTER = 40  # portions; encoding fewer takes less time than starting processes
MOST_PROCESSES = 32  # by default; each needs some 400 MiB of memory
_PRELOADED = ["torch", "transformers.models.auto.tokenization_auto", "dist_ft.data.render.special_text"]
Portion = Sequence[Numbered]


def encode_in_order(
    encode: RowEncoder, rows: Iterable[Numbered], processes: int | None = None
) -> Generator[EncodedRows]:
    """Yield the encoded rows in portions, in the order of the rows.

    Args:
        encode: Function that encodes a portion.
        rows: Rows with their index in the source and their place.
        processes: Number of processes; 1 encodes in this process. By default, this process starts, and if there are
            many rows, as many processes as there are CPU cores continue.

    Raises:
        RequestError: Rows cannot be read, or a key of the configuration does not match the data.
        MachineError: A process was killed.
    """
    portions = _portions(rows)
    if processes is None:
        for _, portion in zip(range(START_AFTER), portions, strict=False):
            yield encode(portion)
        processes = min(count_cores(), MOST_PROCESSES)
    if processes == 1:
        yield from map(encode, portions)
        return
    if (first := next(portions, None)) is not None:
        yield from _encode_in_processes(encode, chain([first], portions), processes)


def count_cores() -> int:
    """Return the number of CPU cores that this process may use: of its affinity, and of the quota of its cgroup."""
    import joblib

    return int(joblib.cpu_count())


def _portions(rows: Iterable[Numbered]) -> Iterator[Portion]:
    """Yield the rows in portions of at most ROWS_AT_ONCE, and about CHARACTERS_AT_ONCE unless a row is larger."""
    portion: list[Numbered] = []
    size = 0
    for row in rows:
        portion.append(row)
        size += _size_of(row[2])
        if len(portion) == ROWS_AT_ONCE or size >= CHARACTERS_AT_ONCE:
            yield portion
            portion, size = [], 0
    if portion:
        yield portion


def _size_of(value: Any) -> int:
    """Return the number of characters of all texts in a row, with the numbers of a list as one character each."""
    if isinstance(value, str):
        return len(value)
    if isinstance(value, JsonLine):
        return len(value.text)
    if isinstance(value, dict):
        return sum(map(_size_of, value.values()))
    if isinstance(value, list):
        return len(value) if value and isinstance(value[0], int) else sum(map(_size_of, value))
    return 1


def _encode_in_processes(encode: RowEncoder, portions: Iterator[Portion], processes: int) -> Iterator[EncodedRows]:
    """Yield the encoded portions; a fault of reading is raised after those that were read before it."""
    context = multiprocessing.get_context("forkserver")  # fork could deadlock: libraries have threads by now
    context.set_forkserver_preload(_PRELOADED)
    pool = ProcessPoolExecutor(processes, context, _begin, (encode,))
    pending: deque[tuple[Portion, Future[EncodedRows]]] = deque()
    fault: DistFtError | None = None
    goes_on = True
    try:
        while goes_on or pending:
            while goes_on and len(pending) < 2 * processes:
                try:
                    portion = next(portions)
                except StopIteration:
                    goes_on = False
                except DistFtError as error:
                    goes_on, fault = False, error
                else:
                    pending.append((portion, pool.submit(_encode, portion)))
            if pending:
                yield _result(pending)
        if fault is not None:
            raise fault
    finally:
        pool.shutdown(cancel_futures=True)


def _result(pending: deque[tuple[Portion, Future[EncodedRows]]]) -> EncodedRows:
    portion, future = pending.popleft()
    try:
        return future.result()
    except BrokenProcessPool as error:
        last = pending[-1][0] if pending else portion
        rule = f"a process that encodes rows was killed, at a row between {portion[0][1]} and {last[-1][1]}"
        way_out = "if memory ran out, set a smaller data.num_proc (1 uses no further process) or request more memory"
        raise MachineError.of("data.num_proc", rule, way_out) from error


_encode_portion: RowEncoder | None = None  # in a process of the pool


def _begin(encode: RowEncoder) -> None:
    """Prepare a process of the pool: keep the function that it calls, and end when the parent process has ended."""
    global _encode_portion
    _encode_portion = encode
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent process ends this one
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=_end_with, args=(parent.sentinel,), daemon=True).start()


def _end_with(sentinel: int) -> None:
    wait([sentinel])
    os._exit(1)


def _encode(portion: Portion) -> EncodedRows:
    assert _encode_portion is not None, "_begin is called first"
    return _encode_portion(portion)
